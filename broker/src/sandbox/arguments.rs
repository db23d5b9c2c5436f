//! System calls that are allowed with some arguments only.
//!
//! A filter sees the numbers that a call passes, not the memory to which they point.

use nix::libc;
use seccompiler::{BackendError, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompRule};

use super::role::Part::{self, Process, Rings, Serving};

/// What an argument must be; the first number is its place, from 0.
#[derive(Clone, Copy, Debug)]
pub(super) enum Argument {
    /// One of these values of an `int`.
    OneOf(u8, &'static [u64]),
    /// One of these values of a `long`.
    LongOneOf(u8, &'static [u64]),
    /// None of these bits.
    Without(u8, u64),
    /// Zero, or the number of this process.
    ThisProcess(u8),
}

use Argument::{LongOneOf, OneOf, ThisProcess, Without};

/// One way in which a call is made.
pub(super) struct Use {
    /// What makes it.
    pub(super) part: Part,
    pub(super) call: i64,
    /// All of them must hold.
    pub(super) arguments: &'static [Argument],
    /// What it is for, for readers.
    #[allow(dead_code, reason = "it documents the table")]
    purpose: &'static str,
}

const fn of(part: Part, call: i64, arguments: &'static [Argument], purpose: &'static str) -> Use {
    Use { part, call, arguments, purpose }
}

/// Flags of `open(2)` that make a file, with or without a name, or empty it.
const MAKES_FILE: u64 = (libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY)) as u64;

/// The same, and those with which a file is written.
const MAKES_OR_WRITES_FILE: u64 = MAKES_FILE | libc::O_ACCMODE as u64;

/// Commands of `fcntl(2)`: flags, copies, locks that belong to an open file, seals. No signals, no leases.
const FCNTLS: &[u64] = &[
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
    libc::F_GETFL as u64,
    libc::F_DUPFD_CLOEXEC as u64,
    libc::F_OFD_GETLK as u64,
    libc::F_OFD_SETLK as u64,
    libc::F_ADD_SEALS as u64,
    libc::F_GET_SEALS as u64,
];

/// Operations of `io_uring_register(2)` (`<linux/io_uring.h>`) on the ring of a worker, after its start: the disk comes and goes.
const WORKER_REGISTERS: &[u64] = &[
    2,  // REGISTER_FILES
    3,  // UNREGISTER_FILES
    13, // REGISTER_FILES2
    // Workers name their rings by an index.
    REGISTERED_RING | 2,
    REGISTERED_RING | 3,
];
/// `IORING_REGISTER_USE_REGISTERED_RING`.
const REGISTERED_RING: u64 = 1 << 31;

/// Those on the rings of guests.
const GUEST_RING_REGISTERS: &[u64] = &[
    1,  // UNREGISTER_BUFFERS
    2,  // REGISTER_FILES
    4,  // REGISTER_EVENTFD
    5,  // UNREGISTER_EVENTFD
    11, // REGISTER_RESTRICTIONS
    12, // REGISTER_ENABLE_RINGS
    15, // REGISTER_BUFFERS2
    16, // REGISTER_BUFFERS_UPDATE
    19, // REGISTER_IOWQ_MAX_WORKERS
    30, // REGISTER_CLONE_BUFFERS
];

/// Requests of `ioctl(2)` (`<linux/fs.h>`, `<linux/loop.h>`, `<asm-generic/ioctls.h>`): non-blocking and close-on-exec
/// of sockets, and queries to block devices.
const IOCTLS: &[u64] = &[0x5421, 0x5451, 0x125e, 0x1268, 0x127a, 0x127b, 0x127c, 0x8008_1272, 0x4c05];

/// `PR_SET_NAME`; `PR_SET_VMA`, with which libraries name their memory; `PR_GET_AUXV`, from which they learn the page
/// size.
const PRCTLS: &[u64] = &[15, 0x5356_4d41, 0x4155_5856];

/// The flags with which glibc starts a thread; musl adds CLONE_DETACHED.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

const EXEC: u64 = libc::PROT_EXEC as u64;

/// Every use of these calls; all others are refused.
pub(super) const USES: &[Use] = &[
    of(Serving, libc::SYS_io_uring_register, &[OneOf(1, WORKER_REGISTERS)], "rings of workers"),
    of(Rings, libc::SYS_io_uring_register, &[OneOf(1, GUEST_RING_REGISTERS)], "rings of guests"),
    of(Serving, libc::SYS_openat, &[Without(2, MAKES_FILE)], "disk, /proc, /sys"),
    of(Rings, libc::SYS_openat, &[Without(2, MAKES_OR_WRITES_FILE)], "ring tokens, /proc"),
    of(Serving, libc::SYS_unlinkat, &[OneOf(2, &[0])], "socket files at the end"),
    of(Process, libc::SYS_fcntl, &[OneOf(1, FCNTLS)], "locks of disks and tokens, flags of eventfds, seals of memfds"),
    // Without signals to processes (O_ASYNC).
    of(
        Process,
        libc::SYS_fcntl,
        &[OneOf(1, &[libc::F_SETFL as u64]), Without(2, libc::O_ASYNC as u64)],
        "O_NOATIME of the disk, O_NONBLOCK of doorbells",
    ),
    of(Serving, libc::SYS_ioctl, &[OneOf(1, IOCTLS)], "sockets; size, blocks and state of a block device"),
    of(Process, libc::SYS_prctl, &[OneOf(0, PRCTLS)], "names of threads and memory"),
    of(
        Process,
        libc::SYS_memfd_create,
        &[OneOf(1, &[1, 3])],
        "in-flight regions, scratch of guests (MFD_CLOEXEC, MFD_ALLOW_SEALING)",
    ),
    // No memory becomes executable.
    of(Process, libc::SYS_mmap, &[Without(2, EXEC)], "guest memory, rings, allocator"),
    of(Process, libc::SYS_mprotect, &[Without(2, EXEC)], "allocator, stacks of threads"),
    // A process reads its own limits; only that of files changes, with the size of the disk.
    of(
        Process,
        libc::SYS_prlimit64,
        &[ThisProcess(0), LongOneOf(2, &[0])],
        "limits in messages; stack size of threads",
    ),
    of(Process, libc::SYS_prlimit64, &[ThisProcess(0), OneOf(1, &[libc::RLIMIT_FSIZE as u64])], "resize, memfds"),
    of(Serving, libc::SYS_sched_setaffinity, &[OneOf(0, &[0])], "a worker that starts moves itself to its CPU"),
    of(Process, libc::SYS_tgkill, &[ThisProcess(0)], "abort"),
    // Threads, not processes, and no namespaces.
    of(
        Process,
        libc::SYS_clone,
        &[LongOneOf(0, &[THREAD, THREAD | libc::CLONE_DETACHED as u64])],
        "writers, ring set-up",
    ),
    of(
        Serving,
        libc::SYS_getsockopt,
        &[OneOf(1, &[libc::SOL_SOCKET as u64]), OneOf(2, &[libc::SO_PEERCRED as u64, libc::SO_ERROR as u64])],
        "who a front-end or a client is",
    ),
    // To the peer of the socket, not to an address.
    of(Serving, libc::SYS_sendto, &[LongOneOf(4, &[0])], "answers"),
];

/// The same calls under names that only older architectures have.
#[cfg(target_arch = "x86_64")]
pub(super) const USES_HERE: &[Use] = &[of(Serving, libc::SYS_open, &[Without(1, MAKES_FILE)], "libraries")];
#[cfg(not(target_arch = "x86_64"))]
pub(super) const USES_HERE: &[Use] = &[];

impl Use {
    /// The rules that allow this: one for each combination of the values.
    pub(super) fn rules(&self) -> Result<Vec<SeccompRule>, BackendError> {
        let mut combinations = vec![Vec::new()];
        for argument in self.arguments {
            let choices = argument.choices()?;
            combinations = combinations
                .into_iter()
                .flat_map(|first: Vec<SeccompCondition>| {
                    choices.iter().map(move |choice| [first.clone(), vec![choice.clone()]].concat())
                })
                .collect();
        }
        combinations.into_iter().map(SeccompRule::new).collect()
    }
}

impl Argument {
    fn choices(self) -> Result<Vec<SeccompCondition>, BackendError> {
        let equal = |place, len: Len, values: &[u64]| -> Result<Vec<SeccompCondition>, BackendError> {
            values.iter().map(|&value| SeccompCondition::new(place, len.clone(), Op::Eq, value)).collect()
        };
        match self {
            OneOf(place, values) => equal(place, Len::Dword, values),
            LongOneOf(place, values) => equal(place, Len::Qword, values),
            Without(place, bits) => Ok(vec![SeccompCondition::new(place, Len::Dword, Op::MaskedEq(bits), 0)?]),
            ThisProcess(place) => equal(place, Len::Dword, &[0, std::process::id().into()]),
        }
    }
}
