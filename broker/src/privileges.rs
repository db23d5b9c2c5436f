//! The privileges of a server: a server has none, so the probe judges a machine without them.

use std::io;
use std::panic::resume_unwind;
use std::thread;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Privileges cannot be given up.
#[derive(Debug, thiserror::Error)]
#[error("cannot give up privileges: {what} failed: {source}")]
pub struct PrivilegesError {
    /// The step that failed.
    pub(crate) what: &'static str,
    /// The error that the kernel returned.
    pub(crate) source: io::Error,
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> PrivilegesError {
    move |source| PrivilegesError { what, source: source.into() }
}

/// Runs `work` as this process would run it without privileges, in a thread of its own, and waits for the result. The
/// process keeps its privileges.
///
/// # Errors
///
/// The thread cannot be started, or cannot give up its privileges.
pub fn without_privileges<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, PrivilegesError> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("unprivileged".into());
        let thread = builder.spawn_scoped(scope, || give_up().map(|()| work()));
        thread.map_err(failed("starting a thread"))?.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Gives up the capabilities of this thread for good: even executing a file with the set-user-ID bit gives none back.
///
/// One capability can stay: CAP_IPC_LOCK, which lifts the limit of pinned memory, where there is such a limit.
pub(crate) fn give_up() -> Result<(), PrivilegesError> {
    let had = capabilities(None).map_err(failed("reading capabilities"))?.effective;
    let is_unlimited = getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft == RLIM_INFINITY);
    let kept = if is_unlimited { CapabilitySet::empty() } else { had & CapabilitySet::IPC_LOCK };

    set_no_new_privs(true).map_err(failed("PR_SET_NO_NEW_PRIVS"))?;
    if had.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    clear_ambient_capability_set().map_err(failed("clearing ambient capabilities"))?;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed("giving up capabilities"))
}

/// Removes the capabilities that an executed file could give. Without CAP_SETPCAP the set cannot be changed, and with
/// PR_SET_NO_NEW_PRIVS it has no effect.
fn empty_bounding_set() -> Result<(), PrivilegesError> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(capability) {
            Ok(true) => remove_capability_from_bounding_set(capability)
                .map_err(failed("emptying the bounding set of capabilities"))?,
            Ok(false) => {}
            // The kernel knows no further capabilities.
            Err(_) => break,
        }
    }
    Ok(())
}
