//! What makes and runs guests' rings for an engine: a *ring host*, which is a process of its own or a few threads.
//!
//! The engine parses what front-ends and guests send, which is where holes are most likely. A ring has the rights
//! of its creator, and io_uring goes around seccomp filters. So a program forks a ring host at its start
//! (`RingHost::fork`, feature `sandbox`): a process that has no secrets and no files, parses no input of guests and front-ends, and makes rings
//! with the operator's policy. The engine's own process then cannot make any ring, whatever code runs in it.
//! An embedder that does not want a second process gets the same host as threads ([`RingHost::in_threads`]).
//!
//! The engine and the host have three sockets (`channel`), over which go fixed messages (`message`):
//!
//! | socket | from | messages | who waits |
//! | --- | --- | --- | --- |
//! | orders | the engine's builder | pin these regions for this disk, make a ring, change memory, unpin | the builder, up to seconds |
//! | control | any thread of the engine | a new call eventfd, close, cancel, a suspicion, the disk's new size | a worker, for a batch at most |
//! | events | the host | a ring runs, a ring is gone, a ring has more outstanding than it may have | |
//!
//! Each side notices the end of the other by its sockets: a host ends with its engine, and an engine's process with its
//! host. `client` and `control` are the engine's side, `host` the other one, and `guard` its thread that watches what rings cost.

mod channel;
mod client;
mod config;
mod control;
mod guard;
mod host;
mod message;
mod outbox;
mod own_disk;
#[cfg(feature = "sandbox")]
mod process;
mod refused;
#[cfg(test)]
mod tests;

use std::io;
use std::thread;

pub(crate) use client::{HostedRing, NewRing, PinError, RingClient};
pub use config::AttachConfig;
pub(crate) use config::SEGMENT_BYTES_MAX;
pub(crate) use control::{NextEvent, RingControl, RingEvents, RingOwner};
pub(crate) use host::DRAIN_PATIENCE;
pub(crate) use message::RingId;
#[cfg(feature = "sandbox")]
pub use process::Confinement;
pub use refused::Refused;

use channel::Channel;
use client::START_PATIENCE;

use crate::threads::{AbortOnPanic, leave_signals_to_others};

/// A ring host cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start what makes the guests' rings: {what}: {source}")]
pub struct RingHostError {
    what: &'static str,
    source: io::Error,
}

impl RingHostError {
    fn of<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self { what, source: source.into() }
    }
}

/// A ring host that was started, for one engine. The host ends when this is dropped.
#[derive(Debug)]
pub struct RingHost {
    orders: Channel,
    control: Channel,
    events: Channel,
}

impl RingHost {
    /// Starts a host for a device with so many queues as threads of this process.
    ///
    /// # Errors
    ///
    /// No descriptors or threads.
    pub fn in_threads(config: AttachConfig, queue_count: u16) -> Result<Self, RingHostError> {
        let (engine, host) = sockets()?;
        let starting = "a thread";
        // The limit of file sizes belongs to the program.
        let (mut maker, controller) =
            host::new(config, queue_count, None, host).map_err(RingHostError::of(starting))?;
        spawn("ring-maker", move || {
            maker.run();
            maker.tell_end();
        })
        .map_err(RingHostError::of(starting))?;
        spawn("ring-control", move || {
            controller.run();
        })
        .map_err(RingHostError::of(starting))?;
        Ok(engine)
    }

    /// Waits until the host has started.
    ///
    /// # Errors
    ///
    /// It could not start.
    pub(crate) fn open(self) -> Result<(RingClient, RingEvents), RingHostError> {
        let Self { orders, control, events } = self;
        let starting = |why: String| RingHostError { what: "the ring process", source: io::Error::other(why) };
        client::open([orders, control, events], START_PATIENCE).map_err(starting)
    }
}

/// The sockets between an engine and a host: both ends.
fn sockets() -> Result<(RingHost, [Channel; 3]), RingHostError> {
    let pair = || Channel::pair().map_err(RingHostError::of("a pair of sockets"));
    let [(orders, their_orders), (control, their_control), (events, their_events)] = [pair()?, pair()?, pair()?];
    Ok((RingHost { orders, control, events }, [their_orders, their_control, their_events]))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(move || {
        leave_signals_to_others();
        // The engine waits for what these threads do.
        let _abort = AbortOnPanic;
        work();
    })?;
    Ok(())
}
