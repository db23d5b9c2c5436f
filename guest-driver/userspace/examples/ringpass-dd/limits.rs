//! Open files: a lack of them must not come up between two messages to the server.

use anyhow::{Context, Result, bail};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The connection, the memory, the in-flight region, the input or output, the channel for signals, with room to spare.
const FILES: u64 = 12;
/// Of each queue: eventfds of its virtqueue and of its ring.
const FILES_PER_QUEUE: u64 = 4;

/// Raises the soft limit of open files to the hard one, and makes sure that there is room for so many queues.
pub(crate) fn make_room(queues: u16) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        // What is there may be enough.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
    let needed = FILES + FILES_PER_QUEUE * (u64::from(queues) + 1);
    // Opened and closed again: nothing tells how many are open where /proc is not mounted.
    let files: Result<Vec<OwnedFd>, Errno> = (0..needed).map(|_| eventfd(0, EventfdFlags::CLOEXEC)).collect();
    match files {
        Ok(_) => Ok(()),
        Err(Errno::MFILE) => bail!(
            "RLIMIT_NOFILE is {}, and {needed} more files than are open are needed for {queues} queues: raise it (`ulimit -n \
             {}`), or use fewer with --queues",
            limit.maximum.unwrap_or(u64::MAX),
            needed + 8
        ),
        Err(errno) => Err(errno).context("making room for the files of the copy"),
    }
}
