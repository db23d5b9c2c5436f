//! Events on their way to the engine.
//!
//! A thread of its own sends them, so that neither the guard nor the end of a ring waits for an engine that does not
//! read.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::channel::Channel;
use super::message::{Encoded, HostEvent};
use super::spawn;

/// The way to the thread.
#[derive(Debug)]
pub(super) struct Outbox {
    events: Sender<Item>,
    backlog: Arc<AtomicUsize>,
}

#[derive(Debug)]
enum Item {
    Event(HostEvent),
    End,
}

impl Outbox {
    /// Starts the thread.
    pub(super) fn start(channel_to_engine: Channel) -> io::Result<Self> {
        let (events, receiver) = channel();
        let backlog = Arc::new(AtomicUsize::new(0));
        let sent = Arc::clone(&backlog);
        spawn("ring-events", move || send_all(&receiver, &channel_to_engine, &sent))?;
        Ok(Self { events, backlog })
    }

    /// Sends an event after those that are on their way.
    pub(super) fn put(&self, event: HostEvent) {
        self.backlog.fetch_add(1, Ordering::Relaxed);
        // The thread ends only after `close`, when no event is of interest.
        let _ = self.events.send(Item::Event(event));
    }

    /// The engine finds the end of the events after those that are on their way.
    pub(super) fn close(&self) {
        let _ = self.events.send(Item::End);
    }

    /// How many events the engine has not got.
    pub(super) fn backlog(&self) -> usize {
        self.backlog.load(Ordering::Relaxed)
    }
}

fn send_all(receiver: &Receiver<Item>, channel: &Channel, backlog: &AtomicUsize) {
    while let Ok(Item::Event(event)) = receiver.recv() {
        let Encoded { words, text, fds } = event.encode();
        // Without an engine the host ends.
        let _ = channel.send(&words, &text, &fds);
        backlog.fetch_sub(1, Ordering::Relaxed);
    }
}
