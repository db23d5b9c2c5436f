//! The limit of open files: the program must not hit it between two messages to the server.

use anyhow::{Context, Result, bail};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The connection, the memory, the in-flight region, the input or output and the channel for signals, with a reserve.
const FILES: u64 = 12;
/// Files of each queue: eventfds of its virtqueue and of its ring.
const FILES_PER_QUEUE: u64 = 4;

/// Raises the soft limit of open files to the hard limit, and checks that there is room for `queues` queues.
pub(crate) fn make_room(queues: u16) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        // If this fails, the present limit may still suffice.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
    let needed = FILES + FILES_PER_QUEUE * (u64::from(queues) + 1);
    // Open and close that many files: without /proc there is no other way to find out how many are open.
    let files: Result<Vec<OwnedFd>, Errno> = (0..needed).map(|_| eventfd(0, EventfdFlags::CLOEXEC)).collect();
    match files {
        Ok(_) => Ok(()),
        Err(Errno::MFILE) => bail!(
            "RLIMIT_NOFILE is {}, but {queues} queues need {needed} files in addition to those already open: raise the limit \
             (`ulimit -n {}`), or use fewer queues (--queues)",
            limit.maximum.unwrap_or(u64::MAX),
            needed + 8
        ),
        Err(errno) => Err(errno).context("cannot reserve the files of the copy"),
    }
}
