//! Giving up capabilities.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use super::SandboxError;
use crate::limits::raise_memlock;
use crate::privileges::give_up;

/// How long a thread that was joined can stay in the list of threads: until the kernel has run it to its end.
const THREAD_END: Duration = Duration::from_secs(5);
const THREAD_LOOK: Duration = Duration::from_micros(200);

/// A process without capabilities, which cannot get any.
#[derive(Debug)]
pub struct Unprivileged(());

/// Raises the limit of memory that may be pinned as far as this process may, and then gives up every capability, for good:
/// also an executed file with the set-user-ID bit gives none. It stays the user that it is.
///
/// One can stay: CAP_IPC_LOCK, by which no such limit counts, in a process that has it and cannot raise the limit for want of
/// CAP_SYS_RESOURCE (root in some containers). A guest gains nothing by it: what is pinned is its own memory.
///
/// What the process can do then, [`without_privileges`](crate::privileges::without_privileges) finds out before.
///
/// # Errors
///
/// There are other threads; the kernel refuses. Nothing but the limit has changed then.
pub fn drop_privileges() -> Result<Unprivileged, SandboxError> {
    let threads = threads().map_err(SandboxError::system("counting threads"))?;
    if threads != 1 {
        return Err(SandboxError::Threads { threads });
    }
    if let Err(error) = raise_memlock() {
        tracing::warn!(%error, "cannot raise RLIMIT_MEMLOCK: guests' rings have what it allows now");
    }
    give_up()?;
    Ok(Unprivileged(()))
}

/// How many threads this process has. A thread that has been joined is waited for.
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
