//! Restricting the system calls that the process can still make: seccomp.

use std::collections::BTreeMap;
use std::io;

use nix::libc;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, apply_filter_all_threads};

use super::arguments::{USES, USES_HERE};
use super::role::Part::{self, Process, Rings, Serving};
use super::{Restricted, Role, SandboxError, refused};

/// Calls that a part needs with any arguments once the process has started.
struct Calls {
    part: Part,
    numbers: &'static [i64],
}

const fn calls(part: Part, numbers: &'static [i64]) -> Calls {
    Calls { part, numbers }
}

/// All of them, including those that a library makes in an emergency (a panic, an abort). `arguments` has the calls that are allowed with
/// some arguments only: those that open and copy files, make memory and threads.
const ALLOWED: &[Calls] = &[
    // The SQs of workers; the doorbells of guests' rings.
    calls(Process, &[libc::SYS_io_uring_enter]),
    calls(Rings, &[libc::SYS_io_uring_setup]),
    // Eventfds, /proc, memfds, memory files, the log.
    calls(
        Process,
        &[
            libc::SYS_close,
            libc::SYS_read,
            libc::SYS_pread64,
            libc::SYS_write,
            libc::SYS_lseek,
            libc::SYS_fstat,
            libc::SYS_newfstatat,
            libc::SYS_statx,
            libc::SYS_fstatfs,
            libc::SYS_readlinkat,
            // Processes of this user, in messages about locks and pinned memory.
            libc::SYS_getdents64,
            libc::SYS_ftruncate,
            libc::SYS_eventfd2,
        ],
    ),
    // The disk, the page cache, kicks, socket files.
    calls(
        Serving,
        &[
            libc::SYS_readv,
            libc::SYS_preadv,
            libc::SYS_preadv2,
            libc::SYS_writev,
            libc::SYS_pwrite64,
            libc::SYS_pwritev,
            libc::SYS_pwritev2,
            libc::SYS_statfs,
            libc::SYS_faccessat,
            libc::SYS_faccessat2,
            libc::SYS_flock,
            libc::SYS_fsync,
            libc::SYS_fdatasync,
            libc::SYS_fadvise64,
            CACHESTAT,
        ],
    ),
    // Front-ends and operators; the server and its ring process. No new sockets.
    calls(Process, &[libc::SYS_ppoll, libc::SYS_recvmsg, libc::SYS_sendmsg]),
    calls(
        Serving,
        &[libc::SYS_accept4, libc::SYS_recvfrom, libc::SYS_shutdown, libc::SYS_getsockname, libc::SYS_getpeername],
    ),
    // Doorbells.
    calls(Rings, &[libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2]),
    // Memory.
    calls(Process, &[libc::SYS_munmap, libc::SYS_mremap, libc::SYS_madvise, libc::SYS_brk]),
    // Threads.
    calls(
        Process,
        &[
            libc::SYS_exit,
            libc::SYS_exit_group,
            libc::SYS_futex,
            libc::SYS_set_robust_list,
            libc::SYS_rseq,
            libc::SYS_gettid,
            libc::SYS_getpid,
            libc::SYS_sched_yield,
            libc::SYS_sched_getaffinity,
            libc::SYS_sigaltstack,
            libc::SYS_rt_sigaction,
            libc::SYS_rt_sigprocmask,
            libc::SYS_rt_sigreturn,
            libc::SYS_restart_syscall,
        ],
    ),
    // The thread for signals.
    calls(Serving, &[libc::SYS_rt_sigtimedwait]),
    // Time, and the identity of the process and the machine.
    calls(
        Process,
        &[
            libc::SYS_nanosleep,
            libc::SYS_clock_nanosleep,
            libc::SYS_clock_gettime,
            libc::SYS_clock_getres,
            libc::SYS_gettimeofday,
            libc::SYS_getrandom,
            libc::SYS_getuid,
            libc::SYS_geteuid,
            libc::SYS_getgid,
            libc::SYS_getegid,
            libc::SYS_capget,
            libc::SYS_uname,
            libc::SYS_sysinfo,
            libc::SYS_getrusage,
        ],
    ),
];

/// The same calls under names that only older architectures have.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[Calls] = &[
    calls(
        Process,
        &[
            libc::SYS_readlink,
            libc::SYS_poll,
            // std calls this in a thread that exits the process while another thread already does so.
            libc::SYS_pause,
            libc::SYS_time,
        ],
    ),
    calls(Serving, &[libc::SYS_stat, libc::SYS_lstat, libc::SYS_access, libc::SYS_unlink]),
    calls(Rings, &[libc::SYS_epoll_wait]),
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[Calls] = &[];

/// `cachestat(2)`, Linux 6.5: the same number on all architectures.
const CACHESTAT: i64 = 451;

impl Restricted {
    /// Leaves all threads of this process, including later ones, the system calls that a process of this role makes.
    ///
    /// Any other call fails with EPERM, and a line on standard error names it. A system call of another architecture
    /// ends the process.
    ///
    /// # Errors
    ///
    /// The kernel has no seccomp.
    pub fn filter_system_calls(self, role: Role) -> Result<(), SandboxError> {
        let filtering = "filtering system calls (seccomp)";
        refused::install_handler(role).map_err(SandboxError::system(filtering))?;
        let programs = programs(role).map_err(io::Error::other).map_err(SandboxError::system(filtering))?;
        for program in programs {
            apply_filter_all_threads(&program).map_err(io::Error::other).map_err(SandboxError::system(filtering))?;
        }
        Ok(())
    }
}

fn programs(role: Role) -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let always = ALLOWED.iter().chain(ALLOWED_HERE).filter(|calls| role.has(calls.part));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        always.flat_map(|calls| calls.numbers).map(|&number| (number, Vec::new())).collect();
    for used in USES.iter().chain(USES_HERE).filter(|used| role.has(used.part)) {
        rules.entry(used.call).or_default().extend(used.rules()?);
    }
    // The flags of clone3(2) are in memory, where a filter cannot look; without that call, libraries fall back to
    // clone(2).
    rules.insert(libc::SYS_clone3, Vec::new());
    let calls = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, architecture())?;

    let clone3 = [(libc::SYS_clone3, Vec::new())].into_iter().collect();
    let no_such_call = SeccompAction::Errno(libc::ENOSYS as u32);
    let no_clone3 = SeccompFilter::new(clone3, SeccompAction::Allow, no_such_call, architecture())?;
    Ok([no_clone3.try_into()?, calls.try_into()?])
}

#[cfg(target_arch = "x86_64")]
fn architecture() -> seccompiler::TargetArch {
    seccompiler::TargetArch::x86_64
}

#[cfg(target_arch = "aarch64")]
fn architecture() -> seccompiler::TargetArch {
    seccompiler::TargetArch::aarch64
}
