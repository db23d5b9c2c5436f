//! Restricting the system calls that the process can still make: seccomp.

use std::collections::BTreeMap;
use std::io;

use nix::libc;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, apply_filter_all_threads};

use super::arguments::{USES, USES_HERE};
use super::{Restricted, SandboxError, refused};

/// The calls that serving needs with any arguments once it has started, including those that a library makes in an
/// emergency (a panic, an abort).
const ALLOWED: &[i64] = &[
    // Rings.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    // Open files. `arguments` has the calls that open and copy them.
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    // Eventfds, front-ends, clients of the control socket. No new sockets.
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Memory: in-flight regions and scratch are memfds.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads.
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
    libc::SYS_rt_sigtimedwait,
    libc::SYS_restart_syscall,
    // Time, and the identity of the process and the machine.
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
];

/// The same calls under names that only older architectures have.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[i64] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    // std calls this in a thread that exits the process while another thread already does so.
    libc::SYS_pause,
    libc::SYS_time,
    CACHESTAT,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[i64] = &[CACHESTAT];

/// `cachestat(2)`, Linux 6.5: the same number on all architectures.
const CACHESTAT: i64 = 451;

impl Restricted {
    /// Leaves all threads of this process, including later ones, the system calls that serving makes.
    ///
    /// Any other call fails with EPERM, and a line on standard error names it. A system call of another architecture
    /// ends the process.
    ///
    /// # Errors
    ///
    /// The kernel has no seccomp.
    pub fn filter_system_calls(self) -> Result<(), SandboxError> {
        let filtering = "filtering system calls (seccomp)";
        refused::install_handler().map_err(SandboxError::system(filtering))?;
        let programs = programs().map_err(io::Error::other).map_err(SandboxError::system(filtering))?;
        for program in programs {
            apply_filter_all_threads(&program).map_err(io::Error::other).map_err(SandboxError::system(filtering))?;
        }
        Ok(())
    }
}

fn programs() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let always = ALLOWED.iter().chain(ALLOWED_HERE).map(|&call| (call, Vec::new()));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = always.collect();
    for used in USES.iter().chain(USES_HERE) {
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
