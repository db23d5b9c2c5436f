//! Shows on a real ring that each operation reaches what the table of operations says. A policy allows one operation,
//! this process owns the ring, and the test looks at what the operation does to it.

mod files;
mod memory;
mod network;
mod waiting;

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
use ringpass_restrictions::{Ends, Operation, Reach, RegisterOperation, RestrictionKind, Sqe, SqeFlags};
use ringpass_tests::{
    harness::{self, test},
    needs::Need,
    restricted_ring::RestrictedRing,
};
use tempfile::TempDir;

const EFAULT: i32 = 14;
const AT_FDCWD: i32 = -100;
const AT_FDCWD_WORD: u32 = AT_FDCWD as u32;
/// An address in the first page, where nothing is ever mapped.
const UNMAPPED: u64 = 8;
/// The number of requests that wait. There could be a million as well.
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
    tests.push(test("each_other_row_of_the_table_has_a_reason_why_no_test_shows_it", [], || {
        let rest = Operation::named().filter(|&operation| untestable(operation).is_some()).count();
        ensure!(rest == 3, "{rest} operations are not shown");
        Ok(())
    }));
    harness::run(tests)
}

/// The reason why no test shows this row.
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
        ensure!(kernel::support()?.operations.contains(operation), "this kernel does not have it");
        Ok(())
    })
}

/// Runs the demonstration on a thread of its own, so that its io-wq workers are its own too.
fn show(operation: Operation) -> Result<()> {
    let facts = operation.facts().context("a row")?;
    let claimed = facts.reach;
    let (shown, has_worker) = thread::spawn(move || -> Result<(Reach, bool)> {
        let mut lab = Lab::new(operation)?;
        let shown = lab.demonstrate(operation)?;
        Ok((shown, lab.has_worker()?))
    })
    .join()
    .map_err(|_| anyhow::anyhow!("the demonstration panicked"))??;
    let shown = shown | if has_worker { Reach::UNBOUNDED_MEMORY } else { Reach::empty() };
    match facts.ends {
        Ends::AtOnce => ensure!(!has_worker, "a worker thread served it: it does not end at once"),
        // Only files that flush when they are closed (FUSE, NFS) send it to a worker.
        Ends::WithWorker if operation == Operation::CLOSE => {}
        Ends::WithWorker => ensure!(has_worker, "no worker thread served it"),
        _ => {}
    }
    ensure!(shown.contains(claimed), "not shown: {}", claimed.difference(shown));
    // The kernel gives any read or write that would block to a worker. How many do depends on the file system.
    let by_chance = if is_transfer(operation) { Reach::UNBOUNDED_MEMORY } else { Reach::empty() };
    let unsaid = shown.difference(claimed | by_chance);
    ensure!(unsaid.is_empty(), "the table does not say: {unsaid}");
    Ok(())
}

/// A pipe: the end to read from, and the end to write to.
fn pipe() -> Result<(File, File)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((reader.into(), writer.into()))
}

fn is_transfer(operation: Operation) -> bool {
    let name = operation.to_string();
    name.starts_with("IORING_OP_READ") || name.starts_with("IORING_OP_WRITE")
}

/// A ring that allows one operation (and what must come before it), in a process that has a secret.
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

    /// Submits one SQE and returns its result.
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

    /// Shows that the operation reads at the address that `make` puts into an SQE: it fails with -EFAULT where nothing
    /// is mapped, and not at `good`.
    fn reads(&mut self, good: u64, make: impl Fn(Sqe, u64) -> Sqe) -> Result<Reach> {
        let bad = self.run(make(self.sqe(), UNMAPPED))?;
        ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
        let result = self.run(make(self.sqe(), good))?;
        ensure!(result != -EFAULT, "a good address gave -EFAULT");
        Ok(Reach::READS_MEMORY)
    }

    /// Shows that such SQEs can wait in any number.
    fn waits(&mut self, sqe: Sqe) -> Result<Reach> {
        // SAFETY: as for `run`; a waiting request never accesses memory.
        let results = unsafe { self.ring.submit(&vec![sqe; MANY], 0) }?;
        ensure!(
            results.iter().all(Option::is_none),
            "some requests did not wait: {:?}",
            results.iter().flatten().next()
        );
        Ok(Reach::UNBOUNDED_MEMORY)
    }

    /// Whether an io-wq worker has served this thread's requests, which queue for it without limit.
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
}

fn is_open(fd: RawFd) -> bool {
    fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok()
}

/// Takes ownership of a descriptor that an operation has made. Returns `None` if it is not open.
fn own(fd: RawFd) -> Result<Option<OwnedFd>> {
    ensure!(fd > 2, "descriptor {fd}");
    // SAFETY: the descriptor is open, and an operation of the demonstration has made it; no other code owns it.
    Ok(is_open(fd).then(|| unsafe { OwnedFd::from_raw_fd(fd) }))
}
