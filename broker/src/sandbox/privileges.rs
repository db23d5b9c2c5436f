//! Giving up capabilities.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use rustix::process::{getegid, getgroups};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::SandboxError;

/// A process without capabilities, which cannot get any.
#[derive(Debug)]
pub struct Unprivileged(());

/// Raises the limit of memory that may be pinned as far as this process may, and then gives up every capability, for good:
/// also an executed file with the set-user-ID bit gives none. It stays the user that it is.
///
/// One can stay: CAP_IPC_LOCK, by which no such limit counts, in a process that has it and cannot raise the limit for want of
/// CAP_SYS_RESOURCE (root in some containers). A guest gains nothing by it: what is pinned is its own memory.
///
/// # Errors
///
/// There are other threads; io_uring could not be used without privileges; the kernel refuses. Nothing but the limit has
/// changed then.
pub fn drop_privileges() -> Result<Unprivileged, SandboxError> {
    let threads = fs::read_dir("/proc/self/task").map_err(SandboxError::system("counting threads"))?.count();
    if threads != 1 {
        return Err(SandboxError::Threads { threads });
    }
    let had = capabilities(None).map_err(SandboxError::system("reading capabilities"))?.effective;
    if had.contains(CapabilitySet::SYS_ADMIN) {
        check_io_uring_group()?;
    }
    let is_unlimited = raise_memlock(had.contains(CapabilitySet::SYS_RESOURCE))?;
    let kept = if is_unlimited { CapabilitySet::empty() } else { had & CapabilitySet::IPC_LOCK };

    set_no_new_privs(true).map_err(SandboxError::system("PR_SET_NO_NEW_PRIVS"))?;
    if had.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    clear_ambient_capability_set().map_err(SandboxError::system("clearing ambient capabilities"))?;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(SandboxError::system("giving up capabilities"))?;
    Ok(Unprivileged(()))
}

/// Does something with the rights that are left when [`drop_privileges`] has been called, and has the privileges again after it:
/// to find out beforehand what will not be possible. Only this thread is changed.
///
/// # Errors
///
/// The kernel refuses.
pub fn without_privileges<T>(work: impl FnOnce() -> T) -> Result<T, SandboxError> {
    let failed = || SandboxError::system("putting capabilities aside");
    let had = capabilities(None).map_err(failed())?;
    set_capabilities(None, CapabilitySets { effective: CapabilitySet::empty(), ..had }).map_err(failed())?;
    let result = work();
    set_capabilities(None, had).map_err(SandboxError::system("taking capabilities up again"))?;
    Ok(result)
}

/// What an executed file could give. Without CAP_SETPCAP the set cannot be changed, and with PR_SET_NO_NEW_PRIVS it says
/// nothing.
fn empty_bounding_set() -> Result<(), SandboxError> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(capability) {
            Ok(true) => remove_capability_from_bounding_set(capability)
                .map_err(SandboxError::system("emptying the bounding set of capabilities"))?,
            Ok(false) => {}
            // No more capabilities than this kernel knows.
            Err(_) => break,
        }
    }
    Ok(())
}

/// How much memory the guest will have, nobody knows yet. True: there is no limit any more.
fn raise_memlock(may_raise_hard: bool) -> Result<bool, SandboxError> {
    let raising = "raising RLIMIT_MEMLOCK";
    let (soft_bytes, hard_bytes) = getrlimit(Resource::RLIMIT_MEMLOCK).map_err(SandboxError::system(raising))?;
    let wanted_bytes = if may_raise_hard { RLIM_INFINITY } else { hard_bytes };
    if soft_bytes != wanted_bytes {
        setrlimit(Resource::RLIMIT_MEMLOCK, wanted_bytes, wanted_bytes).map_err(SandboxError::system(raising))?;
    }
    Ok(wanted_bytes == RLIM_INFINITY)
}

/// `kernel.io_uring_disabled` (Linux 6.6): 1 leaves io_uring to CAP_SYS_ADMIN and to one group. Kernels before have no such
/// file, and 2 forbids it to everybody, which is found when it is used.
fn check_io_uring_group() -> Result<(), SandboxError> {
    let read = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok()?;
        text.trim().parse::<i64>().ok()
    };
    if read("io_uring_disabled") != Some(1) {
        return Ok(());
    }
    let group = read("io_uring_group").unwrap_or(-1);
    let groups = getgroups().map_err(SandboxError::system("reading this process's groups"))?;
    let is_member = groups.into_iter().chain([getegid()]).any(|member| i64::from(member.as_raw()) == group);
    if is_member { Ok(()) } else { Err(SandboxError::IoUringGroup { group }) }
}
