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
pub(crate) const DISK_BYTES: u64 = 256 << 20;
/// Opcodes that the crate `io_uring` does not have in all versions (`<linux/io_uring.h>`).
const BIND: u8 = 56;
const LISTEN: u8 = 57;

/// Which process of a server is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The process that takes apart what front-ends and guests send.
    Server,
    /// The process that makes the rings of guests.
    RingProcess,
}

/// A server, another one in another directory, and a place for what injected code needs in memory.
pub(crate) struct Taken {
    pub(crate) tracee: Tracee,
    /// The process that was taken over.
    pub(crate) pid: u32,
    /// Where arguments stand in that process.
    pub(crate) arguments: u64,
    server: BrokerProcess,
    other: BrokerProcess,
    directories: [TempDir; 2],
}

fn start(directory: &Path) -> Result<BrokerProcess> {
    let disk = directory.join("disk.img");
    File::create(&disk)?.set_len(DISK_BYTES)?;
    BrokerProcess::start(&directory.join("s"), &disk, &["--num-queues", "1", "--mode", "direct"])
}

impl Taken {
    pub(crate) fn new(place: Place) -> Result<Self> {
        let directories = [TempDir::with_prefix("ringpass-taken-")?, TempDir::with_prefix("ringpass-other-")?];
        let (server, other) = (start(directories[0].path())?, start(directories[1].path())?);
        let pid = match place {
            Place::Server => server.pid(),
            Place::RingProcess => server.ring_process().context("the server has no ring process")?,
        };
        let tracee = Tracee::stop(pid)?;
        let arguments = tracee.map(1)?;
        Ok(Self { tracee, pid, arguments, server, other, directories })
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.directories[0].path().join("disk.img")
    }

    /// A path in the memory of the process.
    fn path(&self, path: &Path) -> Result<u64> {
        let mut bytes = path.as_os_str().as_encoded_bytes().to_vec();
        bytes.push(0);
        self.tracee.write(self.arguments, &bytes)?;
        Ok(self.arguments)
    }

    /// An address of a socket in the memory of the process, and its length.
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
    pub(crate) fn serves(self) -> Result<()> {
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

pub(crate) fn assert_is(answer: Answer, errno: Errno, what: &str) -> Result<()> {
    ensure!(answer == Err(errno), "{what}: {answer:?} instead of {errno:?}");
    Ok(())
}

/// Injected code in the server makes no ring, and does nothing with those of the workers.
pub(crate) fn rings() -> Result<()> {
    let taken = Taken::new(Place::Server)?;
    let at = taken.arguments;
    assert_is(taken.call(libc::SYS_io_uring_setup, &[1, at])?, Errno::PERM, "io_uring_setup")?;
    let mut rings = 0;
    for entry in fs::read_dir(format!("/proc/{}/fd", taken.pid))? {
        let entry = entry?;
        if fs::read_link(entry.path()).is_ok_and(|link| link == Path::new("anon_inode:[io_uring]")) {
            let ring: u64 = entry.file_name().to_string_lossy().parse()?;
            // Buffers, probe, restrictions, enabling, another ring's buffers, a larger ring.
            for operation in [0, 8, 11, 12, 15, 30, 33] {
                let answer = taken.call(libc::SYS_io_uring_register, &[ring, operation, at, 1])?;
                assert_is(answer, Errno::PERM, &format!("register operation {operation}"))?;
            }
            // The ring belongs to the worker's thread.
            let entered = taken.call(libc::SYS_io_uring_enter, &[ring, 1, 0, 0, 0, 0])?;
            assert_is(entered, Errno::EXIST, "io_uring_enter")?;
            rings += 1;
        }
    }
    ensure!(rings > 0, "the server has no io_uring");
    taken.serves()
}

pub(crate) fn processes(place: Place) -> Result<()> {
    let taken = Taken::new(place)?;
    let at = taken.arguments;
    let sibling = match place {
        Place::Server => taken.server.ring_process().context("the server has no ring process")?,
        Place::RingProcess => taken.server.pid(),
    };
    for other in [taken.other.pid(), sibling].map(u64::from) {
        for (what, number, arguments) in [
            ("sched_setaffinity", libc::SYS_sched_setaffinity, vec![other, 8, at]),
            ("prlimit64", libc::SYS_prlimit64, vec![other, u64::from(libc::RLIMIT_NOFILE), 0, at]),
            ("kill", libc::SYS_kill, vec![other, 0]),
            ("tgkill", libc::SYS_tgkill, vec![other, other, 0]),
            ("ptrace", libc::SYS_ptrace, vec![u64::from(libc::PTRACE_ATTACH), other]),
            ("process_vm_readv", libc::SYS_process_vm_readv, vec![other, at, 1, at, 1]),
            ("pidfd_open", libc::SYS_pidfd_open, vec![other]),
            ("setpriority", libc::SYS_setpriority, vec![0, other, 19]),
            ("fcntl(F_SETOWN)", libc::SYS_fcntl, vec![0, libc::F_SETOWN as u64, other]),
            ("execve", libc::SYS_execve, vec![at, 0, 0]),
            ("fork", libc::SYS_clone, vec![libc::SIGCHLD as u64]),
        ] {
            assert_is(taken.call(number, &arguments)?, Errno::PERM, what)?;
        }
        let memory = taken.path(Path::new(&format!("/proc/{other}/mem")))?;
        let opened = taken.call(libc::SYS_openat, &[libc::AT_FDCWD as u64, memory, libc::O_RDONLY as u64, 0])?;
        assert_is(opened, Errno::ACCESS, "the memory of another process")?;
        if place == Place::RingProcess {
            let opened = Entry {
                opcode: opcode::OpenAt::CODE,
                fd: libc::AT_FDCWD,
                addr: memory,
                op_flags: libc::O_RDWR as u32,
                ..Entry::default()
            };
            assert_is(Ring::new(&taken.tracee)?.execute(opened)?, Errno::ACCESS, "the memory of another process")?;
        }
    }
    taken.serves()
}

/// A path that the process does not see.
fn assert_unseen(taken: &Taken, ring: Option<&Ring<'_>>, from: i32, path: &Path) -> Result<()> {
    let (address, buffer) = (taken.path(path)?, taken.tracee.map(1)?);
    let mut answers = vec![
        ("newfstatat", taken.call(libc::SYS_newfstatat, &[from as u64, address, buffer, 0])?),
        ("openat", taken.call(libc::SYS_openat, &[from as u64, address, libc::O_RDONLY as u64, 0])?),
    ];
    if let Some(ring) = ring {
        let entry = Entry { fd: from, addr: address, ..Entry::default() };
        let stat = Entry { opcode: opcode::Statx::CODE, off: buffer, ..entry };
        answers.push(("statx by a ring", ring.execute(stat)?));
        answers.push(("openat by a ring", ring.execute(Entry { opcode: opcode::OpenAt::CODE, ..entry })?));
    }
    for (what, answer) in answers {
        let is_refused = matches!(answer, Err(Errno::NOENT | Errno::ACCESS | Errno::PERM));
        ensure!(is_refused, "{what} of {}: {answer:?}", path.display());
    }
    Ok(())
}

pub(crate) fn files(place: Place) -> Result<()> {
    let taken = Taken::new(place)?;
    let here = libc::AT_FDCWD;
    // The server makes no ring.
    let ring = (place == Place::RingProcess).then(|| Ring::new(&taken.tracee)).transpose()?;
    let other = taken.directories[1].path().join("disk.img");
    let up = PathBuf::from("../".repeat(20) + "etc/passwd");
    let through_other = PathBuf::from(format!("/proc/{}/root/etc/passwd", taken.other.pid()));
    let mut hidden = vec![PathBuf::from("/etc/passwd"), other.clone(), up.clone(), through_other];
    if place == Place::RingProcess {
        // Not even what the server sees.
        hidden.extend([taken.image(), taken.server.socket().to_owned()]);
    }
    for path in hidden {
        assert_unseen(&taken, ring.as_ref(), here, &path)?;
    }
    // Nothing leads out of the directories that the process has open.
    let process = format!("/proc/{}/fd", taken.pid);
    let mut open = 0;
    for entry in fs::read_dir(&process)? {
        let entry = entry?;
        if fs::metadata(entry.path()).is_ok_and(|found| found.is_dir()) {
            assert_unseen(&taken, ring.as_ref(), entry.file_name().to_string_lossy().parse()?, &up)?;
            open += 1;
        }
    }
    // The directory for the tokens of rings.
    ensure!(open == i32::from(place == Place::RingProcess), "{open} directories are open");
    // No new directories and files, also not where the process may look.
    for directory in ["/", "/dev/shm", "/proc", &taken.directories[0].path().display().to_string()] {
        let address = taken.path(&Path::new(directory).join("made"))?;
        assert_is(taken.call(libc::SYS_mkdir, &[address, 0o700])?, Errno::PERM, "mkdir")?;
        assert_is(taken.call(libc::SYS_mkdirat, &[here as u64, address, 0o700])?, Errno::PERM, "mkdirat")?;
        let create = (libc::O_CREAT | libc::O_RDWR) as u64;
        assert_is(taken.call(libc::SYS_openat, &[here as u64, address, create, 0o600])?, Errno::PERM, "a new file")?;
        let Some(ring) = &ring else { continue };
        let made = Entry { opcode: opcode::MkDirAt::CODE, fd: here, addr: address, len: 0o700, ..Entry::default() };
        let answer = ring.execute(made)?;
        ensure!(matches!(answer, Err(Errno::ACCESS | Errno::NOENT)), "mkdir in {directory} by a ring: {answer:?}");
        let made = Entry {
            opcode: opcode::OpenAt::CODE,
            fd: here,
            addr: address,
            len: 0o600,
            op_flags: create as u32,
            ..Entry::default()
        };
        let answer = ring.execute(made)?;
        ensure!(matches!(answer, Err(Errno::ACCESS | Errno::NOENT)), "a file in {directory} by a ring: {answer:?}");
    }
    // Access lists and other attributes of files, also of the server's own disk.
    let (name, value) = (taken.tracee.map(1)?, taken.tracee.map(1)?);
    taken.tracee.write(name, b"user.injected\0")?;
    for file in [other, taken.image()] {
        let path = taken.path(&file)?;
        let answer = taken.call(libc::SYS_setxattr, &[path, name, value, 1, 0])?;
        assert_is(answer, Errno::PERM, "an attribute")?;
        let Some(ring) = &ring else { continue };
        let set =
            Entry { opcode: opcode::SetXattr::CODE, addr: name, off: value, len: 1, addr3: path, ..Entry::default() };
        assert_is(ring.execute(set)?, Errno::NOENT, "an attribute by a ring")?;
    }
    taken.serves()
}

pub(crate) fn sockets(place: Place) -> Result<()> {
    let taken = Taken::new(place)?;
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_VSOCK, libc::AF_PACKET] {
        let made = taken.call(libc::SYS_socket, &[u64::try_from(family)?, libc::SOCK_DGRAM as u64, 0])?;
        assert_is(made, Errno::PERM, &format!("socket of family {family}"))?;
    }
    for (what, number) in [("connect", libc::SYS_connect), ("bind", libc::SYS_bind), ("listen", libc::SYS_listen)] {
        assert_is(taken.call(number, &[0, taken.arguments, 16])?, Errno::PERM, what)?;
    }
    if place == Place::Server {
        // It makes no ring that could do more.
        return taken.serves();
    }

    let ring = Ring::new(&taken.tracee)?;
    // Sockets of the same user: another server's, this server's, and a neighbour's in the directory of this server.
    let neighbour = taken.directories[0].path().join("neighbour");
    let _listener = net::UnixListener::bind(&neighbour)?;
    for socket in [taken.other.socket(), taken.server.socket(), &neighbour] {
        let path = [socket.as_os_str().as_encoded_bytes(), &[0]].concat();
        let address = taken.address(libc::AF_UNIX, &path)?;
        let answer = connect(&ring, libc::AF_UNIX, libc::SOCK_STREAM, address)?;
        assert_is(answer, Errno::NOENT, &format!("the socket {}", socket.display()))?;
    }
    // A new one.
    let path = [taken.directories[0].path().join("made").as_os_str().as_encoded_bytes(), &[0]].concat();
    let (addr, off) = taken.address(libc::AF_UNIX, &path)?;
    let fd = i32::try_from(socket(&ring, libc::AF_UNIX, libc::SOCK_STREAM)?.context("socket")?)?;
    let made = ring.execute(Entry { opcode: BIND, fd, addr, off, ..Entry::default() })?;
    // The second error is that of kernels before 6.11.
    ensure!(matches!(made, Err(Errno::ACCESS | Errno::NOENT | Errno::INVAL)), "a new socket file: {made:?}");
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

/// Known open in the process that makes rings, because only Linux 7.0 restricts the io_uring of a whole task
/// (docs/threat-model.md, "Not promised yet"). If one of these is refused one day, this test and the document change.
pub(crate) fn known_open() -> Result<()> {
    let taken = Taken::new(Place::RingProcess)?;
    let ring = Ring::new(&taken.tracee)?;
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
