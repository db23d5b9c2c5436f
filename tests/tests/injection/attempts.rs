//! What injected code tries.

use std::{
    fs::{self, File},
    net::UdpSocket,
    os::{linux::net::SocketAddrExt, unix::net},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use io_uring::opcode;
use nix::libc::{self, c_int, c_long};
use ringpass_tests::{
    broker_process::BrokerProcess,
    front_end::{
        rig::TestRam,
        session::{FrontEnd, Options},
    },
};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::{
    ring::{Entry, Ring},
    tracee::{Answer, Tracee},
};

/// More than the limit that holds for in-flight regions.
const DISK_BYTES: u64 = 256 << 20;
const PAGE_BYTES: u64 = 4096;
/// Opcodes that the crate `io_uring` does not have in all versions (`<linux/io_uring.h>`).
const FTRUNCATE: u8 = 55;
const BIND: u8 = 56;
const LISTEN: u8 = 57;

/// A server, another one in another directory, and a place for what injected code needs in memory.
struct Taken {
    tracee: Tracee,
    /// Where arguments stand in the server.
    arguments: u64,
    server: BrokerProcess,
    other: BrokerProcess,
    directories: [TempDir; 2],
}

fn start(directory: &Path) -> Result<BrokerProcess> {
    let disk = directory.join("disk.img");
    File::create(&disk)?.set_len(DISK_BYTES)?;
    BrokerProcess::start(&directory.join("s"), &disk, &["--num-queues", "1"])
}

impl Taken {
    fn new() -> Result<Self> {
        let directories = [TempDir::with_prefix("ringpass-taken-")?, TempDir::with_prefix("ringpass-other-")?];
        let (server, other) = (start(directories[0].path())?, start(directories[1].path())?);
        let tracee = Tracee::stop(server.pid())?;
        let arguments = tracee.map(1)?;
        Ok(Self { tracee, arguments, server, other, directories })
    }

    fn image(&self) -> PathBuf {
        self.directories[0].path().join("disk.img")
    }

    /// The number of the descriptor through which the server writes its disk.
    fn disk_fd(&self) -> Result<i32> {
        let image = self.image().canonicalize()?;
        let process = format!("/proc/{}", self.server.pid());
        for entry in fs::read_dir(format!("{process}/fd"))? {
            let entry = entry?;
            let number = entry.file_name().to_string_lossy().into_owned();
            let info = fs::read_to_string(format!("{process}/fdinfo/{number}"))?;
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).context("no flags")?;
            let is_written = i32::from_str_radix(flags.trim(), 8)? & (libc::O_ACCMODE | libc::O_PATH) == libc::O_RDWR;
            if is_written && fs::read_link(entry.path()).is_ok_and(|target| target == image) {
                return Ok(number.parse()?);
            }
        }
        anyhow::bail!("the server has not opened its disk")
    }

    /// A path in the server's memory.
    fn path(&self, path: &Path) -> Result<u64> {
        let mut bytes = path.as_os_str().as_encoded_bytes().to_vec();
        bytes.push(0);
        self.tracee.write(self.arguments, &bytes)?;
        Ok(self.arguments)
    }

    /// An address of a socket in the server's memory, and its length.
    fn address(&self, family: c_int, rest: &[u8]) -> Result<(u64, u64)> {
        let mut bytes = u16::try_from(family)?.to_le_bytes().to_vec();
        bytes.extend(rest);
        self.tracee.write(self.arguments, &bytes)?;
        Ok((self.arguments, bytes.len() as u64))
    }

    fn call(&self, number: c_long, arguments: &[u64]) -> Result<Answer> {
        self.tracee.call(number, arguments)
    }

    /// Lets the server go on. It must serve as before.
    fn serves(self) -> Result<()> {
        let Self { tracee, mut server, .. } = self;
        drop(tracee);
        let mut ram = TestRam::new(1, 4 << 20)?;
        let front_end = server.explain(FrontEnd::connect(server.socket(), &ram.ram, Options::default()))?;
        let mut driver = ram.driver(&front_end, 0, 4096)?;
        driver.write(8, &[0x5a; 4096])?;
        ensure!(driver.read(8, 4096)? == [0x5a; 4096]);
        drop(driver);
        drop(front_end);
        let status = server.terminate()?;
        ensure!(status.success() && !server.socket().exists(), "{status}");
        Ok(())
    }
}

/// A ring makes a socket.
fn socket(ring: &Ring<'_>, family: c_int, kind: c_int) -> Result<Answer> {
    let off = u64::try_from(kind)?;
    ring.execute(Entry { opcode: opcode::Socket::CODE, fd: family, off, ..Entry::default() })
}

/// A ring makes a socket and connects it.
fn connect(ring: &Ring<'_>, family: c_int, kind: c_int, (addr, off): (u64, u64)) -> Result<Answer> {
    let fd = i32::try_from(socket(ring, family, kind)?.context("socket")?)?;
    ring.execute(Entry { opcode: opcode::Connect::CODE, fd, addr, off, ..Entry::default() })
}

fn assert_is(answer: Answer, errno: Errno, what: &str) -> Result<()> {
    ensure!(answer == Err(errno), "{what}: {answer:?} instead of {errno:?}");
    Ok(())
}

pub(crate) fn growth() -> Result<()> {
    let taken = Taken::new()?;
    let fd = taken.disk_fd()?;
    let disk = u64::try_from(fd)?;
    // No limit, soft and hard.
    taken.tracee.write(taken.arguments, &[0xff; 16])?;
    let fsize = u64::from(libc::RLIMIT_FSIZE);
    let raised = taken.call(libc::SYS_prlimit64, &[0, fsize, taken.arguments, 0])?;
    assert_is(raised, Errno::PERM, "prlimit64(RLIMIT_FSIZE)")?;
    let data = taken.tracee.map(1)?;
    let written = taken.call(libc::SYS_pwrite64, &[disk, data, PAGE_BYTES, DISK_BYTES])?;
    assert_is(written, Errno::FBIG, "pwrite64")?;
    let lengthened = taken.call(libc::SYS_ftruncate, &[disk, 2 * DISK_BYTES])?;
    assert_is(lengthened, Errno::FBIG, "ftruncate")?;
    assert_is(taken.call(libc::SYS_fallocate, &[disk, 0, 0, 2 * DISK_BYTES])?, Errno::PERM, "fallocate")?;

    let ring = Ring::new(&taken.tracee)?;
    let written = Entry { opcode: opcode::Write::CODE, fd, off: DISK_BYTES, addr: data, len: 4096, ..Entry::default() };
    assert_is(ring.execute(written)?, Errno::FBIG, "a write by a ring")?;
    let lengthened = Entry { opcode: FTRUNCATE, fd, off: 2 * DISK_BYTES, ..Entry::default() };
    // The second error is that of kernels before 6.9.
    let answer = ring.execute(lengthened)?;
    ensure!(matches!(answer, Err(Errno::FBIG | Errno::INVAL)), "ftruncate by a ring: {answer:?}");
    let allocated = Entry { opcode: opcode::Fallocate::CODE, fd, addr: 2 * DISK_BYTES, ..Entry::default() };
    assert_is(ring.execute(allocated)?, Errno::FBIG, "fallocate by a ring")?;
    let image_bytes = fs::metadata(taken.image())?.len();
    ensure!(image_bytes == DISK_BYTES, "the image has {image_bytes} bytes");
    taken.serves()
}

pub(crate) fn processes() -> Result<()> {
    let taken = Taken::new()?;
    let other = u64::from(taken.other.pid());
    let at = taken.arguments;
    for (what, number, arguments) in [
        ("sched_setaffinity", libc::SYS_sched_setaffinity, vec![other, 8, at]),
        ("prlimit64", libc::SYS_prlimit64, vec![other, u64::from(libc::RLIMIT_NOFILE), 0, at]),
        ("kill", libc::SYS_kill, vec![other, 0]),
        ("tgkill", libc::SYS_tgkill, vec![other, other, 0]),
        ("ptrace", libc::SYS_ptrace, vec![u64::from(libc::PTRACE_ATTACH), other]),
        ("process_vm_readv", libc::SYS_process_vm_readv, vec![other, at, 1, at, 1]),
        ("pidfd_open", libc::SYS_pidfd_open, vec![other]),
        ("setpriority", libc::SYS_setpriority, vec![0, other, 19]),
        ("fcntl(F_SETOWN)", libc::SYS_fcntl, vec![u64::try_from(taken.disk_fd()?)?, libc::F_SETOWN as u64, other]),
        ("execve", libc::SYS_execve, vec![at, 0, 0]),
        ("fork", libc::SYS_clone, vec![libc::SIGCHLD as u64]),
    ] {
        assert_is(taken.call(number, &arguments)?, Errno::PERM, what)?;
    }
    let ring = Ring::new(&taken.tracee)?;
    let memory = taken.path(Path::new(&format!("/proc/{other}/mem")))?;
    let opened = Entry {
        opcode: opcode::OpenAt::CODE,
        fd: libc::AT_FDCWD,
        addr: memory,
        op_flags: libc::O_RDWR as u32,
        ..Entry::default()
    };
    assert_is(ring.execute(opened)?, Errno::ACCESS, "the memory of another server")?;
    taken.serves()
}

pub(crate) fn files() -> Result<()> {
    let taken = Taken::new()?;
    let here = libc::AT_FDCWD;
    let ring = Ring::new(&taken.tracee)?;
    let buffer = taken.tracee.map(1)?;
    let other = taken.directories[1].path().join("disk.img");
    let up = PathBuf::from("../".repeat(20) + "etc/passwd");
    let through_other = PathBuf::from(format!("/proc/{}/root/etc/passwd", taken.other.pid()));
    for path in [Path::new("/etc/passwd"), &other, &up, &through_other] {
        let address = taken.path(path)?;
        for (what, answer) in [
            ("stat", taken.call(libc::SYS_stat, &[address, buffer])?),
            ("newfstatat", taken.call(libc::SYS_newfstatat, &[here as u64, address, buffer, 0])?),
            (
                "statx by a ring",
                ring.execute(Entry {
                    opcode: opcode::Statx::CODE,
                    fd: here,
                    off: buffer,
                    addr: address,
                    ..Entry::default()
                })?,
            ),
            (
                "openat by a ring",
                ring.execute(Entry { opcode: opcode::OpenAt::CODE, fd: here, addr: address, ..Entry::default() })?,
            ),
        ] {
            ensure!(matches!(answer, Err(Errno::NOENT | Errno::ACCESS)), "{what} of {}: {answer:?}", path.display());
        }
    }
    // Nothing leads out of the directories that the server has open.
    let process = format!("/proc/{}/fd", taken.server.pid());
    let mut open = 0;
    for entry in fs::read_dir(&process)? {
        let entry = entry?;
        if fs::metadata(entry.path()).is_ok_and(|found| found.is_dir()) {
            let directory: u64 = entry.file_name().to_string_lossy().parse()?;
            let answer = taken.call(libc::SYS_newfstatat, &[directory, taken.path(&up)?, buffer, 0])?;
            assert_is(answer, Errno::NOENT, "stat by a directory that is open")?;
            open += 1;
        }
    }
    ensure!(open > 0, "the server has no directory for the tokens of rings");
    // No new directories and files, also not where the server may look.
    for directory in ["/", "/dev/shm", "/proc", &taken.directories[0].path().display().to_string()] {
        let address = taken.path(&Path::new(directory).join("made"))?;
        assert_is(taken.call(libc::SYS_mkdir, &[address, 0o700])?, Errno::PERM, "mkdir")?;
        assert_is(taken.call(libc::SYS_mkdirat, &[here as u64, address, 0o700])?, Errno::PERM, "mkdirat")?;
        let made = Entry { opcode: opcode::MkDirAt::CODE, fd: here, addr: address, len: 0o700, ..Entry::default() };
        let answer = ring.execute(made)?;
        ensure!(matches!(answer, Err(Errno::ACCESS | Errno::NOENT)), "mkdir in {directory} by a ring: {answer:?}");
        let made = Entry {
            opcode: opcode::OpenAt::CODE,
            fd: here,
            addr: address,
            len: 0o600,
            op_flags: (libc::O_CREAT | libc::O_RDWR) as u32,
            ..Entry::default()
        };
        let answer = ring.execute(made)?;
        ensure!(matches!(answer, Err(Errno::ACCESS | Errno::NOENT)), "a file in {directory} by a ring: {answer:?}");
    }
    // Access lists of another server's file.
    let name = taken.tracee.map(1)?;
    taken.tracee.write(name, b"user.injected\0")?;
    let path = taken.path(&other)?;
    let set =
        Entry { opcode: opcode::SetXattr::CODE, addr: name, off: buffer, len: 1, addr3: path, ..Entry::default() };
    assert_is(ring.execute(set)?, Errno::NOENT, "an attribute of another server's disk")?;
    taken.serves()
}

pub(crate) fn sockets() -> Result<()> {
    let taken = Taken::new()?;
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_VSOCK, libc::AF_PACKET] {
        let made = taken.call(libc::SYS_socket, &[u64::try_from(family)?, libc::SOCK_DGRAM as u64, 0])?;
        assert_is(made, Errno::PERM, &format!("socket of family {family}"))?;
    }
    for (what, number) in [("connect", libc::SYS_connect), ("bind", libc::SYS_bind), ("listen", libc::SYS_listen)] {
        assert_is(taken.call(number, &[0, taken.arguments, 16])?, Errno::PERM, what)?;
    }

    let ring = Ring::new(&taken.tracee)?;
    let path = taken.other.socket().as_os_str().as_encoded_bytes().to_vec();
    let address = taken.address(libc::AF_UNIX, &[path, vec![0]].concat())?;
    let answer = connect(&ring, libc::AF_UNIX, libc::SOCK_STREAM, address)?;
    assert_is(answer, Errno::NOENT, "the socket of another server")?;
    // A socket in the place of a neighbour's.
    let path = [taken.directories[0].path().join("made").as_os_str().as_encoded_bytes(), &[0]].concat();
    let (addr, off) = taken.address(libc::AF_UNIX, &path)?;
    let fd = i32::try_from(socket(&ring, libc::AF_UNIX, libc::SOCK_STREAM)?.context("socket")?)?;
    let made = ring.execute(Entry { opcode: BIND, fd, addr, off, ..Entry::default() })?;
    // The second error is that of kernels before 6.11.
    ensure!(matches!(made, Err(Errno::ACCESS | Errno::INVAL)), "a new socket file: {made:?}");
    let name = format!("ringpass-test-{}", std::process::id());
    let _abstract = net::UnixListener::bind_addr(&net::SocketAddr::from_abstract_name(&name)?)?;
    let address = taken.address(libc::AF_UNIX, &[&[0], name.as_bytes()].concat())?;
    let answer = connect(&ring, libc::AF_UNIX, libc::SOCK_STREAM, address)?;
    ensure!(matches!(answer, Err(Errno::CONNREFUSED | Errno::PERM)), "an abstract socket: {answer:?}");
    // IPv4, also to this machine.
    let udp = UdpSocket::bind("127.0.0.1:0")?;
    let rest = [&udp.local_addr()?.port().to_be_bytes()[..], &[127, 0, 0, 1], &[0; 8]].concat();
    let address = taken.address(libc::AF_INET, &rest)?;
    let answer = connect(&ring, libc::AF_INET, libc::SOCK_DGRAM, address)?;
    assert_is(answer, Errno::NETUNREACH, "UDP")?;
    let answer = connect(&ring, libc::AF_INET, libc::SOCK_STREAM, address)?;
    ensure!(matches!(answer, Err(Errno::NETUNREACH | Errno::ACCESS)), "TCP: {answer:?}");
    taken.serves()
}

/// Known open until another process makes the rings (docs/threat-model.md, "Not promised yet"). If one of these is
/// refused one day, this test and the document change.
pub(crate) fn known_open() -> Result<()> {
    let taken = Taken::new()?;
    let ring = Ring::new(&taken.tracee)?;
    // A socket of the same user in the server's own directory.
    let neighbour = taken.directories[0].path().join("neighbour");
    let _listener = net::UnixListener::bind(&neighbour)?;
    let bytes = [neighbour.as_os_str().as_encoded_bytes(), &[0]].concat();
    let address = taken.address(libc::AF_UNIX, &bytes)?;
    let answer = connect(&ring, libc::AF_UNIX, libc::SOCK_STREAM, address)?;
    ensure!(answer == Ok(0), "a socket in the server's directory: {answer:?}");
    // Attributes of files in that directory.
    let name = taken.tracee.map(1)?;
    taken.tracee.write(name, b"user.injected\0")?;
    let path = taken.path(&taken.image())?;
    let set = Entry { opcode: opcode::SetXattr::CODE, addr: name, off: name, len: 1, addr3: path, ..Entry::default() };
    let answer = ring.execute(set)?;
    ensure!(matches!(answer, Ok(0) | Err(Errno::OPNOTSUPP)), "an attribute in the server's directory: {answer:?}");
    // Sockets in a network namespace that has no networks.
    let netlink = socket(&ring, libc::AF_NETLINK, libc::SOCK_RAW)?;
    ensure!(netlink.is_ok(), "netlink: {netlink:?}");
    let fd = i32::try_from(socket(&ring, libc::AF_INET, libc::SOCK_DGRAM)?.context("UDP")?)?;
    let (addr, off) = taken.address(libc::AF_INET, &[0; 14])?;
    let bound = ring.execute(Entry { opcode: BIND, fd, addr, off, ..Entry::default() })?;
    let listens = ring.execute(Entry { opcode: LISTEN, fd, len: 1, ..Entry::default() })?;
    eprintln!("UDP: bind {bound:?}, listen {listens:?}");
    // vsock knows no namespaces in most kernels.
    let vsock = socket(&ring, libc::AF_VSOCK, libc::SOCK_STREAM)?;
    ensure!(matches!(vsock, Ok(_) | Err(Errno::AFNOSUPPORT | Errno::NODEV)), "vsock: {vsock:?}");
    eprintln!("vsock: {vsock:?}");
    taken.serves()
}
