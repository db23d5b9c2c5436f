//! What the table of operations says each can reach is shown on a real ring: a policy that allows one operation, this
//! process as the ring's owner, and what the operation then does to it.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, fs::FileExt, net::UnixStream},
    },
    path::PathBuf,
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_broker::kernel;
use ringpass_restrictions::{Operation, Reach, RegisterOperation, RestrictionKind, Sqe, SqeFlags};
use ringpass_tests::{
    harness::{self, test},
    needs::Need,
    restricted_ring::RestrictedRing,
};
use tempfile::TempDir;

const EFAULT: i32 = 14;
const AT_FDCWD: i32 = -100;
const AT_FDCWD_WORD: u32 = AT_FDCWD.cast_unsigned();
/// Nothing is ever mapped there: the first page.
const UNMAPPED: u64 = 8;
/// Requests that wait, of which there could as well be a million.
const MANY: usize = 4096;
const SECRET: &[u8; 16] = b"what guests want";
/// Longer than any test.
const HOUR: [u64; 2] = [3600, 0];

fn main() -> ExitCode {
    let mut tests: Vec<_> = Operation::named()
        .filter(|&operation| untestable(operation).is_none())
        .map(|operation| {
            let name = operation.to_string().trim_start_matches("IORING_OP_").to_lowercase();
            test(format!("{name}_reaches_what_the_table_says"), [has(operation)], move || show(operation))
                .off_main_path("kernels differ in their operations")
        })
        .collect();
    tests.push(test("the_rest_of_the_table_says_why_it_is_not_shown", [], || {
        let rest = Operation::named().filter(|&operation| untestable(operation).is_some()).count();
        ensure!(rest == 3, "{rest} operations are not shown");
        Ok(())
    }));
    harness::run(tests)
}

/// Why a row is not shown here.
fn untestable(operation: Operation) -> Option<&'static str> {
    match operation {
        Operation::RECV_ZC => Some("needs a network card with header split"),
        Operation::NOP128 | Operation::URING_CMD128 => {
            Some("needs a ring with SQEs of 128 bytes; as the short operation")
        }
        _ => None,
    }
}

fn has(operation: Operation) -> Need {
    Need::new(format!("{operation} in the kernel"), move || {
        ensure!(kernel::support()?.operations.contains(operation), "this kernel has it not");
        Ok(())
    })
}

/// Runs the demonstration on a thread of its own, whose io-wq workers are its own too.
fn show(operation: Operation) -> Result<()> {
    let claimed = operation.facts().context("a row")?.reach;
    let shown = thread::spawn(move || -> Result<Reach> {
        let mut lab = Lab::new(operation)?;
        let shown = lab.demonstrate(operation)?;
        Ok(shown | if lab.has_worker()? { Reach::UNBOUNDED_MEMORY } else { Reach::empty() })
    })
    .join()
    .map_err(|_| anyhow::anyhow!("the demonstration panicked"))??;
    ensure!(shown.contains(claimed), "not shown: {}", claimed.difference(shown));
    // Any read or write that would block goes to a worker; how many do is a matter of the file system.
    let by_chance = if is_transfer(operation) { Reach::UNBOUNDED_MEMORY } else { Reach::empty() };
    let unsaid = shown.difference(claimed | by_chance);
    ensure!(unsaid.is_empty(), "the table does not say: {unsaid}");
    Ok(())
}

fn is_transfer(operation: Operation) -> bool {
    let name = operation.to_string();
    name.starts_with("IORING_OP_READ") || name.starts_with("IORING_OP_WRITE")
}

/// A ring that allows one operation (and what must come before it), in a process with something to lose.
struct Lab {
    ring: RestrictedRing,
    directory: TempDir,
    secret: File,
    opcode: u8,
}

/// Descriptors in the ring's table.
const SLOT_SECRET: i32 = 0;
const SLOTS: usize = 4;

impl Lab {
    fn new(operation: Operation) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("secret");
        fs::write(&path, SECRET)?;
        let secret = File::options().read(true).write(true).open(&path)?;
        let ring = RestrictedRing::disabled(MANY as u32)?;
        let mut slots = [-1; SLOTS];
        slots[SLOT_SECRET as usize] = secret.as_raw_fd();
        ring.submitter().register_files(&slots)?;
        let before = match operation {
            Operation::PROVIDE_BUFFERS => vec![Operation::READ],
            Operation::READ_MULTISHOT => vec![Operation::PROVIDE_BUFFERS],
            _ => vec![],
        };
        let flags = SqeFlags::FIXED_FILE | SqeFlags::BUFFER_SELECT;
        let mut table = vec![
            RestrictionKind::FlagsAllowed(flags),
            RestrictionKind::RegisterOperation(RegisterOperation::REGISTER_BUFFERS),
        ];
        table.extend(before.into_iter().chain([operation]).map(RestrictionKind::Operation));
        Ok(Self { ring: ring.enable(&table)?, directory, secret, opcode: operation.code() })
    }

    fn sqe(&self) -> Sqe {
        Sqe { opcode: self.opcode, ..Sqe::default() }
    }

    fn path(&self, name: &str) -> Result<(PathBuf, CString)> {
        let path = self.directory.path().join(name);
        let text = CString::new(path.as_os_str().as_bytes())?;
        Ok((path, text))
    }

    /// The result of one SQE.
    fn run(&mut self, sqe: Sqe) -> Result<i32> {
        // SAFETY: each demonstration names memory that it owns and lets nothing of Rust look at meanwhile, or that is
        // not mapped.
        let results = unsafe { self.ring.submit(&[sqe], 1) }?;
        results[0].context("no CQE")
    }

    fn succeed(&mut self, sqe: Sqe) -> Result<i32> {
        let result = self.run(sqe)?;
        ensure!(result >= 0, "{}", std::io::Error::from_raw_os_error(-result));
        Ok(result)
    }

    /// Whether the operation reads at the address that `make` puts into an SQE: -EFAULT where nothing is mapped, and not
    /// so at `good`.
    fn reads(&mut self, good: u64, make: impl Fn(Sqe, u64) -> Sqe) -> Result<Reach> {
        let bad = self.run(make(self.sqe(), UNMAPPED))?;
        ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
        let result = self.run(make(self.sqe(), good))?;
        ensure!(result != -EFAULT, "a good address gave -EFAULT");
        Ok(Reach::READS_MEMORY)
    }

    /// Whether such SQEs wait in any number.
    fn waits(&mut self, sqe: Sqe) -> Result<Reach> {
        // SAFETY: as for `run`; what waits never gets to do anything.
        let results = unsafe { self.ring.submit(&vec![sqe; MANY], 0) }?;
        ensure!(results.iter().all(Option::is_none), "some did not wait: {:?}", results.iter().flatten().next());
        Ok(Reach::UNBOUNDED_MEMORY)
    }

    /// Whether a worker thread of io-wq has served this thread's requests: they queue for it without limit.
    fn has_worker(&self) -> Result<bool> {
        let name = format!("iou-wrk-{}", rustix::thread::gettid().as_raw_nonzero());
        for task in fs::read_dir("/proc/self/task")? {
            // A thread that has just ended has no name.
            let found = fs::read_to_string(task?.path().join("comm")).unwrap_or_default();
            if found.trim() == name {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn demonstrate(&mut self, operation: Operation) -> Result<Reach> {
        let sqe = self.sqe();
        match operation {
            Operation::NOP | Operation::POLL_REMOVE | Operation::ASYNC_CANCEL | Operation::REMOVE_BUFFERS => {
                self.run(Sqe { fd: 1, addr: 0, ..sqe })?;
                Ok(Reach::empty())
            }
            Operation::READ | Operation::READV | Operation::WRITE | Operation::WRITEV => self.plain(operation),
            Operation::READ_FIXED | Operation::WRITE_FIXED => self.fixed(),
            Operation::READV_FIXED | Operation::WRITEV_FIXED => self.fixed_vectors(operation),
            Operation::FSYNC | Operation::SYNC_FILE_RANGE | Operation::FADVISE => {
                // POSIX_FADV_WILLNEED; SYNC_FILE_RANGE_WRITE | WAIT_BEFORE; fsync has neither.
                let rw_flags = if operation == Operation::FSYNC { 0 } else { 3 };
                self.succeed(Sqe { fd: self.secret.as_raw_fd(), rw_flags, len: 16, ..sqe })?;
                Ok(Reach::empty())
            }
            Operation::FALLOCATE => {
                let before = self.secret.metadata()?.len();
                self.succeed(Sqe { fd: self.secret.as_raw_fd(), addr: 1 << 20, ..sqe })?;
                ensure!(self.secret.metadata()?.len() > before);
                Ok(Reach::FILE_SIZE)
            }
            Operation::FTRUNCATE => {
                self.succeed(Sqe { fd: self.secret.as_raw_fd(), off: 1 << 20, ..sqe })?;
                ensure!(self.secret.metadata()?.len() == 1 << 20);
                Ok(Reach::FILE_SIZE)
            }
            Operation::MADVISE => {
                let mut page = memmap2::MmapMut::map_anon(4096)?;
                page[0] = 7;
                // MADV_DONTNEED.
                self.succeed(Sqe { addr: page.as_ptr().addr() as u64, len: 4096, rw_flags: 4, ..sqe })?;
                ensure!(page[0] == 0, "the page is as it was");
                Ok(Reach::WRITES_MEMORY)
            }
            Operation::TIMEOUT | Operation::LINK_TIMEOUT | Operation::TIMEOUT_REMOVE | Operation::POLL_ADD => {
                self.waiting(operation)
            }
            Operation::OPENAT
            | Operation::OPENAT2
            | Operation::CLOSE
            | Operation::FILES_UPDATE
            | Operation::FIXED_FD_INSTALL
            | Operation::PIPE => self.descriptors(operation),
            Operation::STATX
            | Operation::RENAMEAT
            | Operation::UNLINKAT
            | Operation::MKDIRAT
            | Operation::SYMLINKAT
            | Operation::LINKAT => self.paths(operation),
            Operation::SETXATTR | Operation::FSETXATTR | Operation::GETXATTR | Operation::FGETXATTR => {
                self.attributes(operation)
            }
            Operation::SPLICE | Operation::TEE => self.splice(operation),
            Operation::EPOLL_CTL | Operation::EPOLL_WAIT => self.epoll(operation),
            Operation::PROVIDE_BUFFERS | Operation::READ_MULTISHOT => self.provided(operation),
            Operation::MSG_RING => self.other_ring(),
            Operation::WAITID | Operation::FUTEX_WAIT | Operation::FUTEX_WAKE | Operation::FUTEX_WAITV => {
                self.processes(operation)
            }
            _ => self.network(operation),
        }
    }

    fn plain(&mut self, operation: Operation) -> Result<Reach> {
        let is_read = matches!(operation, Operation::READ | Operation::READV);
        let mut memory = if is_read { *b"its own memory.." } else { *b"the owner's own!" };
        let iovec = [memory.as_mut_ptr().addr() as u64, memory.len() as u64];
        let is_vectored = matches!(operation, Operation::READV | Operation::WRITEV);
        let (addr, len) = if is_vectored { (iovec.as_ptr().addr() as u64, 1) } else { (iovec[0], 16) };
        let transfer = Sqe { fd: self.secret.as_raw_fd(), addr, len, ..self.sqe() };
        let mut shown = if is_read { Reach::WRITES_MEMORY } else { Reach::READS_MEMORY };
        if is_vectored {
            shown |= self.reads(addr, |_, addr| Sqe { addr, ..transfer })?;
        }
        self.succeed(transfer)?;
        let mut on_disk = [0; 16];
        self.secret.read_exact_at(&mut on_disk, 0)?;
        let same = std::hint::black_box(memory) == on_disk;
        ensure!(same, "nothing was transferred");
        Ok(shown)
    }

    fn register_buffer(&self, memory: &mut memmap2::MmapMut) -> Result<u64> {
        let address = memory.as_mut_ptr();
        let buffer = nix::libc::iovec { iov_base: address.cast(), iov_len: memory.len() };
        // SAFETY: the mapping outlives the ring's requests: every demonstration waits for its CQEs.
        unsafe { self.ring.submitter().register_buffers(&[buffer]) }?;
        Ok(address.addr() as u64)
    }

    /// Fixed reads and writes do what they say inside their buffer, and -EFAULT one byte beyond it.
    fn fixed(&mut self) -> Result<Reach> {
        let mut memory = memmap2::MmapMut::map_anon(8192)?;
        let address = self.register_buffer(&mut memory)?;
        let transfer = Sqe { flags: 1, fd: SLOT_SECRET, addr: address, len: 16, ..self.sqe() };
        ensure!(self.succeed(transfer)? == 16);
        for beyond in [
            address - 1,
            address + 8192 - 15,
            UNMAPPED,
            self.directory.path().as_os_str().as_bytes().as_ptr().addr() as u64,
        ] {
            let result = self.run(Sqe { addr: beyond, ..transfer })?;
            ensure!(result == -EFAULT, "{beyond:#x} gave {result}");
        }
        Ok(Reach::empty())
    }

    fn fixed_vectors(&mut self, _: Operation) -> Result<Reach> {
        let mut memory = memmap2::MmapMut::map_anon(8192)?;
        let address = self.register_buffer(&mut memory)?;
        let iovec = [address, 16];
        let transfer = Sqe { flags: 1, fd: SLOT_SECRET, len: 1, ..self.sqe() };
        self.reads(iovec.as_ptr().addr() as u64, |_, addr| Sqe { addr, ..transfer })
    }

    fn waiting(&mut self, operation: Operation) -> Result<Reach> {
        let hour = HOUR.as_ptr().addr() as u64;
        match operation {
            Operation::TIMEOUT => {
                let bad = self.run(Sqe { addr: UNMAPPED, len: 1, ..self.sqe() })?;
                ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
                Ok(Reach::READS_MEMORY | self.waits(Sqe { addr: hour, len: 1, ..self.sqe() })?)
            }
            Operation::LINK_TIMEOUT => self.reads(hour, |sqe, addr| Sqe { addr, len: 1, ..sqe }),
            // IORING_TIMEOUT_UPDATE.
            Operation::TIMEOUT_REMOVE => self.reads(hour, |sqe, off| Sqe { addr: 1, off, rw_flags: 2, ..sqe }),
            _ => {
                let (reader, _writer) = std::io::pipe()?;
                self.waits(Sqe { fd: reader.as_raw_fd(), rw_flags: 1, ..self.sqe() })
            }
        }
    }

    fn descriptors(&mut self, operation: Operation) -> Result<Reach> {
        let (_, path) = self.path("new")?;
        let path = path.as_ptr().addr() as u64;
        let create = (nix::libc::O_CREAT | nix::libc::O_RDWR).cast_unsigned();
        match operation {
            Operation::OPENAT => {
                let open = Sqe { fd: AT_FDCWD, len: 0o600, rw_flags: create, ..self.sqe() };
                let reads = self.reads(path, |_, addr| Sqe { addr, ..open })?;
                let opened = self.succeed(Sqe { addr: path, ..open })?;
                ensure!(own(opened)?.is_some(), "no new descriptor");
                Ok(Reach::OTHER_FILES | reads)
            }
            Operation::OPENAT2 => {
                let how = [u64::from(create), 0o600, 0];
                let how = how.as_ptr().addr() as u64;
                let reads = self.reads(how, |sqe, off| Sqe { fd: AT_FDCWD, addr: path, len: 24, off, ..sqe })?;
                let opened = self.succeed(Sqe { fd: AT_FDCWD, addr: path, len: 24, off: how, ..self.sqe() })?;
                ensure!(own(opened)?.is_some(), "no new descriptor");
                Ok(Reach::OTHER_FILES | reads)
            }
            Operation::CLOSE => {
                let victim = self.secret.try_clone()?;
                let fd = std::os::fd::IntoRawFd::into_raw_fd(victim);
                self.succeed(Sqe { fd, ..self.sqe() })?;
                ensure!(!is_open(fd), "the descriptor is still there");
                Ok(Reach::OTHER_FILES)
            }
            Operation::FILES_UPDATE => {
                let other = tempfile::tempfile()?;
                let fds = [other.as_raw_fd()];
                let fds = fds.as_ptr().addr() as u64;
                let reads = self.reads(fds, |sqe, addr| Sqe { addr, len: 1, off: 1, ..sqe })?;
                ensure!(self.succeed(Sqe { addr: fds, len: 1, off: 1, ..self.sqe() })? == 1);
                Ok(Reach::OTHER_FILES | reads)
            }
            Operation::FIXED_FD_INSTALL => {
                let installed = self.succeed(Sqe { flags: 1, fd: SLOT_SECRET, ..self.sqe() })?;
                ensure!(own(installed)?.is_some(), "no new descriptor");
                Ok(Reach::OTHER_FILES)
            }
            _ => {
                let mut fds = [-1i32; 2];
                self.succeed(Sqe { addr: fds.as_mut_ptr().addr() as u64, ..self.sqe() })?;
                let [reader, writer] = std::hint::black_box(fds);
                ensure!(own(reader)?.is_some() && own(writer)?.is_some(), "no new descriptors: {reader} {writer}");
                Ok(Reach::OTHER_FILES | Reach::WRITES_MEMORY)
            }
        }
    }

    fn paths(&mut self, operation: Operation) -> Result<Reach> {
        let (from, from_text) = self.path("secret")?;
        let (to, to_text) = self.path("new")?;
        let (from_at, to_at) = (from_text.as_ptr().addr() as u64, to_text.as_ptr().addr() as u64);
        let at = Sqe { fd: AT_FDCWD, ..self.sqe() };
        let shown = match operation {
            Operation::STATX => {
                let mut buffer = [0u8; 256];
                let statx = Sqe { off: buffer.as_mut_ptr().addr() as u64, len: 0x7ff, ..at };
                let reads = self.reads(from_at, |_, addr| Sqe { addr, ..statx })?;
                ensure!(std::hint::black_box(buffer).iter().any(|&byte| byte != 0), "nothing was written");
                return Ok(Reach::OTHER_FILES | Reach::WRITES_MEMORY | reads);
            }
            Operation::RENAMEAT | Operation::LINKAT => {
                self.reads(from_at, |_, addr| Sqe { addr, off: to_at, len: AT_FDCWD_WORD, ..at })?
            }
            Operation::UNLINKAT => {
                let reads = self.reads(from_at, |_, addr| Sqe { addr, ..at })?;
                ensure!(!from.exists(), "the file is still there");
                return Ok(Reach::OTHER_FILES | reads);
            }
            Operation::MKDIRAT => self.reads(to_at, |_, addr| Sqe { addr, len: 0o700, ..at })?,
            _ => self.reads(from_at, |_, addr| Sqe { addr, off: to_at, ..at })?,
        };
        ensure!(fs::symlink_metadata(&to).is_ok(), "nothing new is there");
        Ok(Reach::OTHER_FILES | shown)
    }

    fn attributes(&mut self, operation: Operation) -> Result<Reach> {
        let (_, path) = self.path("secret")?;
        let by_path = matches!(operation, Operation::SETXATTR | Operation::GETXATTR);
        let sets = matches!(operation, Operation::SETXATTR | Operation::FSETXATTR);
        let name = c"user.ringpass".as_ptr().addr() as u64;
        let mut value = [7u8; 16];
        let target = if by_path {
            Sqe { addr3: path.as_ptr().addr() as u64, ..self.sqe() }
        } else {
            Sqe { fd: self.secret.as_raw_fd(), ..self.sqe() }
        };
        if !sets {
            rustix::fs::fsetxattr(&self.secret, "user.ringpass", &[9; 16], rustix::fs::XattrFlags::empty())
                .context("the temporary directory's file system has no attributes")?;
        }
        let request = Sqe { off: value.as_mut_ptr().addr() as u64, len: 16, ..target };
        let mut shown = self.reads(name, |_, addr| Sqe { addr, ..request })?;
        let mut read = [0; 16];
        if sets {
            rustix::fs::fgetxattr(&self.secret, "user.ringpass", &mut read)?;
            ensure!(read == [7; 16], "the attribute is {read:?}");
        } else {
            ensure!(std::hint::black_box(value) == [9; 16], "the memory is {value:?}");
            shown |= Reach::WRITES_MEMORY;
        }
        Ok(shown | if by_path { Reach::OTHER_FILES } else { Reach::empty() })
    }

    /// Data of a descriptor that is in no table, although the SQE has `IOSQE_FIXED_FILE`.
    fn splice(&mut self, operation: Operation) -> Result<Reach> {
        let (mut out_reader, out_writer) = std::io::pipe()?;
        let (in_reader, mut in_writer) = std::io::pipe()?;
        in_writer.write_all(SECRET)?;
        let from = in_reader.as_raw_fd();
        // `fd` stays a descriptor here: the ring's table was filled before. What matters is the other one.
        let nowhere = if operation == Operation::SPLICE { u64::MAX } else { 0 };
        let request = Sqe {
            fd: out_writer.as_raw_fd(),
            file_index: from.cast_unsigned(),
            off: nowhere,
            addr: nowhere,
            len: 16,
            ..self.sqe()
        };
        ensure!(self.succeed(request)? == 16);
        let mut moved = [0; 16];
        out_reader.read_exact(&mut moved)?;
        ensure!(&moved == SECRET);
        // With the flag, `fd` is a slot, and the source still is not: an open descriptor and a closed one differ.
        let fixed = Sqe { flags: 1, fd: SLOT_SECRET, ..request };
        let closed = self.run(Sqe { file_index: 100_000, ..fixed })?;
        in_writer.write_all(SECRET)?;
        let open = self.run(fixed)?;
        ensure!(closed == -9 && open != -9, "{closed} and {open}");
        Ok(Reach::OTHER_FILES)
    }

    fn epoll(&mut self, operation: Operation) -> Result<Reach> {
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)?;
        let (reader, mut writer) = std::io::pipe()?;
        // struct epoll_event is packed: events, data.
        let mut events = [1u32, 5, 0];
        let at = events.as_mut_ptr().addr() as u64;
        if operation == Operation::EPOLL_CTL {
            // EPOLL_CTL_ADD, by descriptors although the flag says slots.
            let add = Sqe { flags: 1, fd: epoll.as_raw_fd(), len: 1, off: reader.as_raw_fd() as u64, ..self.sqe() };
            let reads = self.reads(at, |_, addr| Sqe { addr, ..add })?;
            ensure!(self.run(Sqe { addr: at, ..add })? == -17, "it is there already");
            return Ok(Reach::OTHER_FILES | reads);
        }
        rustix::event::epoll::add(
            &epoll,
            &reader,
            rustix::event::epoll::EventData::new_u64(5),
            rustix::event::epoll::EventFlags::IN,
        )?;
        let wait = Sqe { fd: epoll.as_raw_fd(), addr: at, len: 1, ..self.sqe() };
        writer.write_all(b"x")?;
        events = [0; 3];
        ensure!(self.succeed(wait)? == 1);
        ensure!(std::hint::black_box(events)[1] == 5, "nothing was written: {events:?}");
        let quiet = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)?;
        Ok(Reach::WRITES_MEMORY | self.waits(Sqe { fd: quiet.as_raw_fd(), ..wait })?)
    }

    fn provided(&mut self, operation: Operation) -> Result<Reach> {
        let mut memory = [0u8; 16];
        let provide = Sqe {
            opcode: Operation::PROVIDE_BUFFERS.code(),
            fd: 1,
            addr: memory.as_mut_ptr().addr() as u64,
            len: 16,
            buf_index: 1,
            ..Sqe::default()
        };
        self.succeed(provide)?;
        let (reader, mut writer) = std::io::pipe()?;
        writer.write_all(SECRET)?;
        let flags = SqeFlags::BUFFER_SELECT.bits();
        let read = match operation {
            Operation::PROVIDE_BUFFERS => Sqe {
                opcode: Operation::READ.code(),
                flags,
                fd: reader.as_raw_fd(),
                len: 16,
                buf_index: 1,
                ..Sqe::default()
            },
            _ => Sqe { flags, fd: reader.as_raw_fd(), buf_index: 1, off: u64::MAX, ..self.sqe() },
        };
        ensure!(self.succeed(read)? == 16);
        ensure!(&std::hint::black_box(memory) == SECRET, "the memory is {memory:?}");
        if operation == Operation::READ_MULTISHOT {
            let (empty, _writer) = std::io::pipe()?;
            self.succeed(provide)?;
            return Ok(Reach::WRITES_MEMORY | self.waits(Sqe { fd: empty.as_raw_fd(), ..read })?);
        }
        // A structure of the kernel for each, 32 000 for one SQE, and as many groups as there are numbers.
        for group in 2..18 {
            self.succeed(Sqe { fd: 32_000, len: 1, buf_index: group, addr: 1 << 20, ..provide })?;
        }
        Ok(Reach::WRITES_MEMORY | Reach::UNBOUNDED_MEMORY)
    }

    /// Messages to a ring that nobody reaps.
    fn other_ring(&mut self) -> Result<Reach> {
        let mut other = io_uring::IoUring::new(4)?;
        let message = Sqe { fd: other.as_raw_fd(), off: 77, len: 5, ..self.sqe() };
        // SAFETY: the operation has no address.
        let results = unsafe { self.ring.submit(&vec![message; MANY], MANY) }?;
        ensure!(results.iter().all(|&result| result == Some(0)), "they were refused");
        let cqe = other.completion().next().context("nothing came")?;
        ensure!(cqe.user_data() == 77 && cqe.result() == 5, "{cqe:?}");
        Ok(Reach::OTHER_RINGS | Reach::UNBOUNDED_MEMORY)
    }

    fn processes(&mut self, operation: Operation) -> Result<Reach> {
        // FUTEX2_SIZE_U32 | FUTEX2_PRIVATE.
        let futex = Sqe { fd: 2 | 128, addr3: u64::from(u32::MAX), ..self.sqe() };
        let word = Arc::new(AtomicU32::new(0));
        let at = word.as_ptr().addr() as u64;
        match operation {
            Operation::WAITID => {
                let mut child = Sleeper::start()?;
                let mut about = [0u8; 128];
                // P_PID, WEXITED.
                let wait = Sqe { fd: child.0.id().cast_signed(), len: 1, file_index: 4, ..self.sqe() };
                let waits = self.waits(Sqe { fd: child.0.id().cast_signed(), ..wait })?;
                child.0.kill()?;
                // Those that waited are served first; another ring shows the rest.
                let mut other = Self::new(operation)?;
                let mut ended = Command::new("true").stdin(Stdio::null()).spawn()?;
                let pid = ended.id().cast_signed();
                other.succeed(Sqe { fd: pid, off: about.as_mut_ptr().addr() as u64, ..wait })?;
                ensure!(std::hint::black_box(about).iter().any(|&byte| byte != 0), "nothing was written");
                ensure!(ended.wait().is_err(), "the child was still there for its parent");
                Ok(Reach::PROCESSES | Reach::WRITES_MEMORY | waits)
            }
            Operation::FUTEX_WAIT => {
                let bad = self.run(Sqe { addr: UNMAPPED & !3, off: 0, ..futex })?;
                ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
                let waits = self.waits(Sqe { addr: at, ..futex })?;
                Ok(Reach::PROCESSES | Reach::READS_MEMORY | waits)
            }
            Operation::FUTEX_WAKE => {
                let bad = self.run(Sqe { addr: 0, off: 1, fd: 2, ..futex })?;
                ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
                let waiter = thread::spawn({
                    let word = word.clone();
                    move || {
                        while word.load(Ordering::SeqCst) == 0 {
                            let flags = rustix::thread::futex::Flags::PRIVATE;
                            match rustix::thread::futex::wait(&word, flags, 0, None) {
                                Ok(()) => return true,
                                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                                Err(_) => return false,
                            }
                        }
                        false
                    }
                });
                let until = Instant::now() + Duration::from_secs(30);
                while self.succeed(Sqe { addr: at, off: 1, ..futex })? == 0 {
                    ensure!(Instant::now() < until, "the thread never waited");
                    thread::yield_now();
                }
                word.store(1, Ordering::SeqCst);
                ensure!(waiter.join().is_ok_and(|woken| woken), "the thread was not woken");
                Ok(Reach::PROCESSES | Reach::READS_MEMORY)
            }
            _ => {
                // struct futex_waitv: val, uaddr, flags.
                let vector = [0, at, 2 | 128];
                let list = vector.as_ptr().addr() as u64;
                let wait = Sqe { len: 1, ..self.sqe() };
                let bad = self.run(Sqe { addr: UNMAPPED, ..wait })?;
                ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
                let waits = self.waits(Sqe { addr: list, ..wait })?;
                Ok(Reach::PROCESSES | Reach::READS_MEMORY | waits)
            }
        }
    }

    fn network(&mut self, operation: Operation) -> Result<Reach> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = socket_address(&listener)?;
        let at = address.as_ptr().addr() as u64;
        let mut buffer = *SECRET;
        let data = buffer.as_mut_ptr().addr() as u64;
        match operation {
            Operation::SOCKET => {
                // AF_INET, SOCK_STREAM.
                let made = self.succeed(Sqe { fd: 2, off: 1, ..self.sqe() })?;
                ensure!(own(made)?.is_some(), "no new descriptor");
                Ok(Reach::NETWORK | Reach::OTHER_FILES)
            }
            Operation::BIND => {
                let socket = socket()?;
                let any = [&[2, 0, 0, 0, 127, 0, 0, 1][..], &[0; 8]].concat();
                let any = any.as_ptr().addr() as u64;
                let fd = socket.as_raw_fd();
                Ok(Reach::NETWORK | self.reads(any, |sqe, addr| Sqe { fd, addr, off: 16, ..sqe })?)
            }
            Operation::LISTEN => {
                self.succeed(Sqe { fd: socket()?.as_raw_fd(), len: 1, ..self.sqe() })?;
                Ok(Reach::NETWORK)
            }
            Operation::CONNECT => {
                let socket = socket()?;
                let fd = socket.as_raw_fd();
                let reads = self.reads(at, |sqe, addr| Sqe { fd, addr, off: 16, ..sqe })?;
                listener.accept()?;
                Ok(Reach::NETWORK | reads)
            }
            Operation::ACCEPT => {
                let _client = TcpStream::connect(listener.local_addr()?)?;
                let (mut peer, mut len) = ([0u8; 16], 16u32);
                let (addr, off) = (peer.as_mut_ptr().addr() as u64, (&raw mut len).addr() as u64);
                let accepted = self.succeed(Sqe { fd: listener.as_raw_fd(), addr, off, ..self.sqe() })?;
                ensure!(own(accepted)?.is_some(), "no new descriptor");
                ensure!(std::hint::black_box(peer) != [0; 16], "nothing was written");
                Ok(Reach::NETWORK | Reach::OTHER_FILES | Reach::WRITES_MEMORY)
            }
            Operation::SHUTDOWN => {
                let (ours, mut theirs) = UnixStream::pair()?;
                self.succeed(Sqe { fd: ours.as_raw_fd(), len: 2, ..self.sqe() })?;
                ensure!(theirs.read(&mut [0])? == 0, "the socket is still open");
                Ok(Reach::NETWORK)
            }
            Operation::URING_CMD => self.socket_commands(),
            _ => {
                let mut client = TcpStream::connect(listener.local_addr()?)?;
                let (mut server, _) = listener.accept()?;
                let iovec = [data, 16];
                let message = [0, 0, iovec.as_ptr().addr() as u64, 1, 0, 0, 0];
                let list = message.as_ptr().addr() as u64;
                let fd = client.as_raw_fd();
                let has_message = matches!(operation, Operation::SENDMSG | Operation::SENDMSG_ZC | Operation::RECVMSG);
                let request = if has_message {
                    Sqe { fd, addr: list, len: 1, ..self.sqe() }
                } else {
                    Sqe { fd, addr: data, len: 16, ..self.sqe() }
                };
                let mut shown = Reach::NETWORK;
                if matches!(operation, Operation::RECV | Operation::RECVMSG) {
                    server.write_all(b"from the network")?;
                    if has_message {
                        let bad = self.run(Sqe { addr: UNMAPPED, ..request })?;
                        ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
                        shown |= Reach::READS_MEMORY;
                    }
                    ensure!(self.succeed(request)? == 16);
                    ensure!(&std::hint::black_box(buffer) == b"from the network", "nothing was written");
                    shown |= Reach::WRITES_MEMORY;
                } else {
                    ensure!(self.succeed(request)? == 16);
                    let mut received = [0; 16];
                    server.read_exact(&mut received)?;
                    ensure!(&received == SECRET, "received {received:?}");
                    shown |= Reach::READS_MEMORY;
                }
                client.flush()?;
                Ok(shown)
            }
        }
    }

    /// `SOCKET_URING_OP_GETSOCKOPT` and `SETSOCKOPT` (Linux 6.7): commands of a socket, on memory of the owner.
    fn socket_commands(&mut self) -> Result<Reach> {
        const SOL_SOCKET: u64 = 1;
        const SO_TYPE: u64 = 3;
        const SO_SNDBUF: u64 = 7;
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let mut value = 0u32;
        let at = (&raw mut value).addr() as u64;
        let request = Sqe { fd: socket.as_raw_fd(), file_index: 4, addr3: at, ..self.sqe() };
        let got = self.run(Sqe { off: 2, addr: SOL_SOCKET | (SO_TYPE << 32), ..request })?;
        if got == -95 {
            bail!("sockets have no commands on this kernel");
        }
        ensure!(got == 4 && std::hint::black_box(value) == 2, "{got}: the memory is {value}");
        let set = Sqe { off: 3, addr: SOL_SOCKET | (SO_SNDBUF << 32), ..request };
        let reads = self.reads(at, |_, addr3| Sqe { addr3, ..set })?;
        Ok(Reach::DRIVER_COMMANDS | Reach::WRITES_MEMORY | reads)
    }
}

/// A child that lives until it is killed.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Result<Self> {
        Ok(Self(Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?))
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // It may be gone, and someone may have waited for it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_open(fd: RawFd) -> bool {
    fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok()
}

/// Takes over a descriptor that an operation has made. None: it is not open.
fn own(fd: RawFd) -> Result<Option<OwnedFd>> {
    ensure!(fd > 2, "descriptor {fd}");
    // SAFETY: the descriptor is open and was made by an operation of the demonstration, which nobody else knows of.
    Ok(is_open(fd).then(|| unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn socket() -> Result<OwnedFd> {
    let (family, kind) = (rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM);
    Ok(rustix::net::socket_with(family, kind, rustix::net::SocketFlags::CLOEXEC, None)?)
}

/// `struct sockaddr_in`.
fn socket_address(listener: &TcpListener) -> Result<[u8; 16]> {
    let port = listener.local_addr()?.port().to_be_bytes();
    let mut address = [0; 16];
    address[..8].copy_from_slice(&[2, 0, port[0], port[1], 127, 0, 0, 1]);
    Ok(address)
}
