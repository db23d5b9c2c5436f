//! A ring host as a process of its own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::unistd::{ForkResult, fork};
use ringpass_guest_abi::request::ErrorCode;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use super::channel::Channel;
use super::config::AttachConfig;
use super::host::{self, Controller, Maker};
use super::message::{Answer, Encoded};
use super::own_disk::OwnDisk;
use super::refused::Refused;
use super::{RingHost, RingHostError, sockets, spawn};
use crate::process_end::end_process;
use crate::ring::{existing_token_directory, token_directory};
use crate::sandbox::{Paths, Role, SandboxError, close_descriptors_but, drop_privileges, isolate, require_one_thread};
use crate::threads::{AbortOnPanic, leave_signals_to_others};

/// The name of the process, in tools that show names of threads.
const NAME: &std::ffi::CStr = c"ringpass-rings";

/// Whether a ring process gives up what it does not need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// All files, networks, privileges and system calls.
    On,
    /// Only descriptors.
    Off,
}

impl RingHost {
    /// Forks a process that is the ring host of a device with so many queues, on this disk. It keeps the limits of this
    /// process and the standard streams, and closes every other descriptor at once. It makes rings on this disk only.
    /// `prepare` runs in the new process while that can still start everything that logging needs.
    ///
    /// Call this while this process has one thread, and before [`isolate`]: the new process hides more files. Call it before this
    /// process has secrets, because the new process has a copy of its memory.
    ///
    /// # Errors
    ///
    /// This process has other threads, or the kernel makes no process. What the new process cannot do is reported by
    /// the engine that gets this host.
    pub fn fork(
        config: AttachConfig,
        queue_count: u16,
        disk: BorrowedFd<'_>,
        confinement: Confinement,
        prepare: impl FnOnce() -> io::Result<()>,
    ) -> Result<Self, RingHostError> {
        require_one_thread().map_err(|error| RingHostError::of("a process")(io::Error::other(error)))?;
        let disk = OwnDisk::of(disk).map_err(RingHostError::of("looking at the disk"))?;
        let (engine, host) = sockets()?;
        // SAFETY: this process has one thread, so no lock is held that the child would miss. The child neither returns nor
        // unwinds from `live`, so nothing of the caller is dropped twice.
        match unsafe { fork() }.map_err(RingHostError::of("a process"))? {
            ForkResult::Parent { .. } => Ok(engine),
            ForkResult::Child => {
                drop(engine);
                live(Beginning { config, queue_count, disk, confinement, prepare }, host)
            }
        }
    }
}

/// What the new process needs to become a host.
struct Beginning<P> {
    config: AttachConfig,
    queue_count: u16,
    disk: OwnDisk,
    confinement: Confinement,
    prepare: P,
}

/// The life of the new process.
fn live(beginning: Beginning<impl FnOnce() -> io::Result<()>>, sockets: [Channel; 3]) -> ! {
    let _abort = AbortOnPanic;
    // The process group gets the signals of a terminal and of a service manager. This process ends with its engine.
    leave_signals_to_others();
    let closed = close_other_descriptors(&sockets).map_err(|error| error.to_string());
    // For the answer, if the start fails with the sockets in hand.
    let answering = sockets[0].as_fd().try_clone_to_owned().map(Channel::from);
    match closed.and_then(|()| start(beginning, sockets)) {
        Ok((mut maker, controller)) => {
            drop(answering);
            // The main thread may be pinning memory when the engine goes.
            if let Err(error) = spawn("ring-control", move || end(controller.run())) {
                tracing::error!(%error, "the ring process cannot start a thread");
                end(false)
            }
            end(maker.run())
        }
        Err(why) => {
            let refused = Answer::Refused(Refused { code: ErrorCode::Resources, why });
            let Encoded { words, text, fds } = refused.encode();
            if let Ok(channel) = answering {
                // An engine that is gone needs no answer.
                let _ = channel.send(&words, &text, &fds);
            }
            end(false)
        }
    }
}

/// Ends the process, with its log.
fn end(is_regular: bool) -> ! {
    end_process(i32::from(!is_regular))
}

fn start(
    beginning: Beginning<impl FnOnce() -> io::Result<()>>,
    sockets: [Channel; 3],
) -> Result<(Maker, Controller), String> {
    let Beginning { config, queue_count, disk, confinement, prepare } = beginning;
    let preparing = |error: io::Error| format!("the ring process cannot prepare itself: {error}");
    rustix::thread::set_name(NAME).map_err(|errno| preparing(errno.into()))?;
    match confinement {
        Confinement::On => confine(prepare).map_err(|error| error.to_string())?,
        Confinement::Off => prepare().map_err(preparing)?,
    }
    host::new(config, queue_count, Some(disk), sockets).map_err(preparing)
}

/// Closes what this process got from its parent: locks, the disk, whatever the embedder has.
fn close_other_descriptors(sockets: &[Channel; 3]) -> Result<(), SandboxError> {
    let streams = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    let own = sockets.iter().map(AsFd::as_fd).chain(streams).chain(existing_token_directory());
    close_descriptors_but(&own.collect::<Vec<_>>())
}

fn confine(prepare: impl FnOnce() -> io::Result<()>) -> Result<(), SandboxError> {
    if let Some(why) = isolate(&[])?.why_not() {
        tracing::info!(
            "ring process sees names and properties of files, and networks: no namespaces of its own ({why})"
        );
    }
    let unprivileged = drop_privileges()?;
    let token_directory = token_directory().map_err(SandboxError::system("making the directory for ring tokens"))?;
    let restricted = unprivileged.restrict_paths(&Paths::none().token_directory(token_directory))?;
    // Other processes of this user must not reach into this one, also where the kernel has no Landlock.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(SandboxError::system("hiding from other processes (PR_SET_DUMPABLE)"))?;
    prepare().map_err(SandboxError::system("starting the log"))?;
    restricted.filter_system_calls(Role::RingProcess)
}
