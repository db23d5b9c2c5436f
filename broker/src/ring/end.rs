//! Detecting that a ring has really ended.
//!
//! Closing a ring's descriptor does not end the ring. Requests under way continue, write into guest memory and post
//! their CQEs, and the kernel takes the ring apart only after the last of them: 20 to 75 ms later with fast I/O, any
//! time later with slow I/O. `waitpid` does not tell either. A registered file does: the kernel releases it at the very
//! end of the ring. So each ring has a *token* as fixed file 1, with a lock on its open file description, and the ring
//! has ended when that lock is gone.
//!
//! The guest can name slot 1, so the token must be useless to the guest. A directory, opened for reading, has no bytes:
//! the kernel answers a read with -EISDIR, a read of no bytes with 0 (Linux 6.18), and every write with -EBADF.

use std::any::Any;
use std::fmt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::token::EndWatch;
use super::{RingError, StillRunning};

/// A value that must stay alive until a ring has really ended.
pub type Keepalive = Box<dyn Any + Send>;

/// How often the ring closer polls at first.
const POLL_MIN: Duration = Duration::from_micros(500);
/// How often it polls when the end takes long.
const POLL_MAX: Duration = Duration::from_millis(20);
/// How often the log mentions a ring that does not end.
const REMIND: Duration = Duration::from_secs(10);
/// An additional wait. The kernel releases the files of a ring a few instructions before it discards completions
/// that did not fit the CQ, which writes `sq.flags` once more; the last close of a file comes a little later than both.
const SETTLE: Duration = Duration::from_millis(5);

/// Reports when a ring and all of its I/O have ended.
///
/// Dropping this stops the watching, not the waiting: the [`RingCloser`] holds all that the I/O needs until the real end.
#[derive(Clone, Debug, Default)]
pub struct RingEnd {
    progress: Arc<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    phase: Mutex<Phase>,
    changed: Condvar,
    listeners: Mutex<Listeners>,
}

/// Functions to call once at the end.
#[derive(Default)]
struct Listeners(Vec<Box<dyn FnOnce() + Send>>);

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Listeners").field(&self.0.len()).finish()
    }
}

#[derive(Clone, Copy, Debug, Default)]
enum Phase {
    #[default]
    Running,
    Closed(Instant),
    Ended {
        after: Duration,
    },
}

impl RingEnd {
    /// Whether the ring and all of its I/O have ended.
    pub fn has_ended(&self) -> bool {
        self.ended_after().is_some()
    }

    /// The time from closing to the end of the ring, once it has ended.
    pub fn ended_after(&self) -> Option<Duration> {
        match *self.phase() {
            Phase::Ended { after } => Some(after),
            Phase::Running | Phase::Closed(_) => None,
        }
    }

    /// Waits for the end, at most for `timeout`. Returns the time from closing to the end.
    ///
    /// # Errors
    ///
    /// [`StillRunning`]: the guest's memory must not be reused, and its requests must not be issued again. The caller
    /// may wait again.
    pub fn wait(&self, timeout: Duration) -> Result<Duration, StillRunning> {
        let (phase, _) = self
            .progress
            .changed
            .wait_timeout_while(self.phase(), timeout, |phase| !matches!(phase, Phase::Ended { .. }))
            .unwrap_or_else(PoisonError::into_inner);
        match *phase {
            Phase::Ended { after } => Ok(after),
            Phase::Closed(at) => Err(StillRunning::Closed { since_close: at.elapsed() }),
            Phase::Running => Err(StillRunning::Open),
        }
    }

    /// Whether both report the end of the same ring.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.progress, &other.progress)
    }

    /// Calls `callback` at the end, on the ring closer's thread, which has other rings to wait for: `callback` must be
    /// quick. If the ring has ended already, calls it at once.
    pub fn on_end(&self, callback: impl FnOnce() + Send + 'static) {
        // Locked before the check, so that an end that comes now either finds `callback` in the list or is seen by the
        // check.
        let mut listeners = self.listeners();
        if self.has_ended() {
            drop(listeners);
            callback();
        } else {
            listeners.0.push(Box::new(callback));
        }
    }

    /// The ring is closed, as far as this process knows. For rings of another process.
    pub(crate) fn note_closed(&self) {
        let mut phase = self.phase();
        if matches!(*phase, Phase::Running) {
            *phase = Phase::Closed(Instant::now());
        }
    }

    /// The ring has ended. For rings of another process.
    pub(crate) fn note_ended(&self) {
        let after = match *self.phase() {
            Phase::Running => Duration::ZERO,
            Phase::Closed(at) => at.elapsed(),
            Phase::Ended { .. } => return,
        };
        self.set(Phase::Ended { after });
    }

    fn listeners(&self) -> MutexGuard<'_, Listeners> {
        self.progress.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.progress.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, phase: Phase) {
        *self.phase() = phase;
        self.progress.changed.notify_all();
        if let Phase::Ended { .. } = phase {
            let listeners = std::mem::take(&mut *self.listeners());
            listeners.0.into_iter().for_each(|callback| callback());
        }
    }
}

/// The thread that closes rings and waits for their ends; each device has one.
///
/// Closing a ring blocks while its SQ thread is in the middle of a batch, so it needs a thread. The thread exists
/// before it is needed, because a guest that makes the kernel start workers must not be able to prevent the closing of
/// a ring. It ends after the last ring, once no other thread can send it a ring.
#[derive(Clone, Debug)]
pub struct RingCloser {
    closed: Sender<Closed>,
}

/// A ring that has been closed, on its way to the end.
struct Closed {
    ring: Keepalive,
    watch: EndWatch,
    keepalive: Keepalive,
    end: RingEnd,
    at: Instant,
}

impl RingCloser {
    /// Starts the thread.
    pub fn start() -> Result<Self, RingError> {
        let (closed, receiver) = channel();
        thread::Builder::new()
            .name("ring-closer".into())
            .spawn(move || reap(&receiver))
            .map_err(RingError::system("starting the thread that waits for the ends of rings"))?;
        Ok(Self { closed })
    }

    /// Drops `ring`, waits for the end, then drops `keepalive`. Returns at once.
    pub(super) fn close(&self, ring: Keepalive, watch: EndWatch, keepalive: Keepalive, end: &RingEnd) {
        let at = Instant::now();
        end.set(Phase::Closed(at));
        if let Err(lost) = self.closed.send(Closed { ring, watch, keepalive, end: end.clone(), at }) {
            // The thread has panicked. Reporting no end is safe, reporting an end is not.
            tracing::error!(
                "the ring closer's thread is gone: the guest memory of a closed ring stays in use for ever"
            );
            std::mem::forget(lost);
        }
    }
}

fn reap(receiver: &Receiver<Closed>) {
    let mut waiting: Vec<Waiting> = Vec::new();
    let mut pause = POLL_MIN;
    loop {
        let closed = if waiting.is_empty() {
            let Ok(closed) = receiver.recv() else { return };
            Some(closed)
        } else {
            match receiver.recv_timeout(pause) {
                Ok(closed) => Some(closed),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => {
                    thread::sleep(pause);
                    None
                }
            }
        };
        pause = if closed.is_some() { POLL_MIN } else { (pause * 2).min(POLL_MAX) };
        waiting.extend(closed.map(Waiting::new));
        waiting.retain_mut(|ring| !ring.has_ended());
    }
}

/// A ring whose descriptor is closed.
struct Waiting {
    watch: EndWatch,
    /// Dropped at the end.
    keepalive: Option<Keepalive>,
    end: RingEnd,
    at: Instant,
    released: Option<Instant>,
    remind: Duration,
}

impl Waiting {
    fn new(closed: Closed) -> Self {
        let Closed { ring, watch, keepalive, end, at } = closed;
        drop(ring);
        Self { watch, keepalive: Some(keepalive), end, at, released: None, remind: REMIND }
    }

    /// Whether the ring has ended; never true too early.
    fn has_ended(&mut self) -> bool {
        let since_close = self.at.elapsed();
        if self.released.is_none() {
            match self.watch.has_ended() {
                Ok(true) => self.released = Some(Instant::now()),
                Ok(false) if since_close > self.remind => {
                    tracing::warn!("{}", StillRunning::Closed { since_close });
                    self.remind += REMIND;
                }
                Err(error) if since_close > self.remind => {
                    tracing::error!(%error, "cannot tell whether a ring has ended: its guest memory stays in use");
                    self.remind += REMIND;
                }
                Ok(false) | Err(_) => {}
            }
        }
        if self.released.is_none_or(|released| released.elapsed() < SETTLE) {
            return false;
        }
        drop(self.keepalive.take());
        self.end.set(Phase::Ended { after: self.at.elapsed() });
        true
    }
}
