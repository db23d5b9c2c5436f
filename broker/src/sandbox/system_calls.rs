//! Restricting the system calls that the process can still make: seccomp.

use std::collections::BTreeMap;
use std::io;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter_all_threads,
};

use super::{Restricted, SandboxError, refused};

/// The calls that serving needs once it has started, including those that a library makes in an emergency (a panic, an
/// abort).
const ALLOWED: &[i64] = &[
    // Rings.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Open files, and those that Landlock lets the process open: the disk, the directory of the tokens, /proc, /sys.
    libc::SYS_openat,
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
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_unlinkat,
    libc::SYS_dup,
    libc::SYS_dup3,
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
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Memory: in-flight regions and scratch are memfds.
    libc::SYS_memfd_create,
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
    libc::SYS_sched_setaffinity,
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
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    // std calls this in a thread that exits the process while another thread already does so.
    libc::SYS_pause,
    libc::SYS_dup2,
    libc::SYS_time,
    CACHESTAT,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[i64] = &[CACHESTAT];

/// `cachestat(2)`, Linux 6.5: the same number on all architectures.
const CACHESTAT: i64 = 451;

/// Requests of `ioctl(2)` (`<linux/fs.h>`, `<linux/loop.h>`, `<asm-generic/ioctls.h>`): non-blocking and close-on-exec
/// of sockets, and queries to block devices. Discard and write zeroes use `fallocate(2)`.
const IOCTLS: &[u64] = &[0x5421, 0x5451, 0x125e, 0x1268, 0x127a, 0x127b, 0x127c, 0x8008_1272, 0x4c05];

/// `PR_SET_NAME`; `PR_SET_VMA`, with which libraries name their memory; `PR_GET_AUXV`, from which they learn the page
/// size.
const PRCTLS: &[u64] = &[15, 0x5356_4d41, 0x4155_5856];

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
    rules.insert(libc::SYS_ioctl, one_of(1, IOCTLS)?);
    rules.insert(libc::SYS_prctl, one_of(0, PRCTLS)?);
    // No memory becomes executable.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![without(2, libc::PROT_EXEC as u64)?]);
    }
    // For this process only.
    rules.insert(libc::SYS_prlimit64, one_of(0, &[0, std::process::id().into()])?);
    rules.insert(libc::SYS_tgkill, one_of(0, &[std::process::id().into()])?);
    // Threads, not processes. The flags of clone3(2) are in memory, where a filter cannot look; without that call,
    // libraries fall back to clone(2).
    let thread = libc::CLONE_THREAD as u64;
    let flags = SeccompCondition::new(0, Len::Qword, Op::MaskedEq(thread), thread)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![flags])?]);
    rules.insert(libc::SYS_clone3, Vec::new());
    let calls = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, architecture())?;

    let clone3 = [(libc::SYS_clone3, Vec::new())].into_iter().collect();
    let no_such_call = SeccompAction::Errno(libc::ENOSYS as u32);
    let no_clone3 = SeccompFilter::new(clone3, SeccompAction::Allow, no_such_call, architecture())?;
    Ok([no_clone3.try_into()?, calls.try_into()?])
}

/// Rules that allow a call whose argument is one of these values.
fn one_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |&value| SeccompRule::new(vec![SeccompCondition::new(argument, Len::Dword, Op::Eq, value)?]);
    values.iter().map(rule).collect()
}

/// A rule that allows a call whose argument has none of these bits.
fn without(argument: u8, bits: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, Len::Dword, Op::MaskedEq(bits), 0)?])
}

#[cfg(target_arch = "x86_64")]
fn architecture() -> seccompiler::TargetArch {
    seccompiler::TargetArch::x86_64
}

#[cfg(target_arch = "aarch64")]
fn architecture() -> seccompiler::TargetArch {
    seccompiler::TargetArch::aarch64
}
