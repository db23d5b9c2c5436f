//! Giving up capabilities.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use super::SandboxError;
use crate::limits::raise_memlock;
use crate::privileges::give_up;

/// How long a joined thread can stay in the list of threads: until the kernel has run it to its end.
const THREAD_END: Duration = Duration::from_secs(5);
const THREAD_LOOK: Duration = Duration::from_micros(200);

/// A process that has no capabilities and cannot get any.
#[derive(Debug)]
pub struct Unprivileged(());

/// Raises the limit of memory that may be pinned as far as this process may, and then gives up every capability for
/// good: even executing a file with the set-user-ID bit gives none back. The process keeps its user.
///
/// One capability can stay: CAP_IPC_LOCK, which lifts that limit, in a process that has it and cannot raise the limit
/// for lack of CAP_SYS_RESOURCE (root in some containers). A guest gains nothing by it: the pinned memory is its own.
///
/// [`without_privileges`](crate::privileges::without_privileges) finds out beforehand what the process can do
/// afterwards.
///
/// # Errors
///
/// There are other threads; or the kernel refuses. Then nothing but the limit has changed.
pub fn drop_privileges() -> Result<Unprivileged, SandboxError> {
    require_one_thread()?;
    if let Err(error) = raise_memlock() {
        tracing::warn!(%error, "cannot raise RLIMIT_MEMLOCK: the present limit applies to guests' rings");
    }
    give_up()?;
    Ok(Unprivileged(()))
}

/// Refuses a process with several threads: namespaces and capabilities belong to threads.
pub(crate) fn require_one_thread() -> Result<(), SandboxError> {
    let threads = threads().map_err(SandboxError::system("counting threads"))?;
    if threads == 1 { Ok(()) } else { Err(SandboxError::Threads { threads }) }
}

/// The number of threads of this process. Waits for threads that have been joined to disappear.
fn threads() -> io::Result<usize> {
    let end = Instant::now() + THREAD_END;
    loop {
        let threads = fs::read_dir("/proc/self/task")?.count();
        if threads <= 1 || Instant::now() >= end {
            return Ok(threads);
        }
        thread::sleep(THREAD_LOOK);
    }
}
