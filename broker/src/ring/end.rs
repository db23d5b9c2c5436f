//! Knowing that a ring has really ended.
//!
//! Closing a ring's descriptor does not end it. Requests under way go on, write into guest memory and post their CQEs,
//! and the kernel takes the ring apart only behind the last of them: 20 to 75 ms later with fast I/O, any time later
//! with slow. `waitpid` tells nothing either. What does tell is a file: one that is registered in the ring is released
//! at the very end of it. So each ring has a *token* as fixed file 1, on whose open file description there is a lock,
//! and the ring has ended when the lock can be taken through another open file description.
//!
//! The guest can name slot 1, so the token must be something that it cannot use: a directory, opened for reading, gives
//! -EISDIR or -EBADF to everything, at once.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};

/// What must stay as it is until a ring has really ended.
pub type Keepalive = Box<dyn Any + Send>;

/// How often a waiting thread looks at first.
const POLL_MIN: Duration = Duration::from_micros(500);
/// How often it looks when the end takes long.
const POLL_MAX: Duration = Duration::from_millis(20);
/// How often a ring that does not end is mentioned in the log.
const REMIND: Duration = Duration::from_secs(10);

/// A file that only a ring will hold.
#[derive(Debug)]
pub(super) struct EndToken {
    held: OwnedFd,
    watch: OwnedFd,
}

impl EndToken {
    /// Makes a directory that exists only through its descriptors, and locks it.
    pub(super) fn new() -> io::Result<Self> {
        let directory = temporary_directory()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let open = || rustix::fs::open(&directory, flags, Mode::empty());
        let opened = open().and_then(|held| Ok((held, open()?)));
        let removed = std::fs::remove_dir(&directory);
        let (held, watch) = opened?;
        removed?;
        rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { held, watch })
    }

    /// From here on only the ring holds the token.
    pub(super) fn released_to_ring(self) -> EndWatch {
        EndWatch { watch: self.watch }
    }
}

impl AsFd for EndToken {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.as_fd()
    }
}

/// A new directory of our own, in memory if there is such a place.
fn temporary_directory() -> io::Result<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let places = runtime.into_iter().chain([PathBuf::from("/dev/shm"), std::env::temp_dir()]);
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for place in places {
        for _ in 0..16 {
            let name = format!(".ringpass-{}-{:016x}", std::process::id(), random()?);
            let path = place.join(name);
            match rustix::fs::mkdir(&path, Mode::RWXU) {
                Ok(()) => return Ok(path),
                Err(rustix::io::Errno::EXIST) => {}
                Err(error) => {
                    last = error.into();
                    break;
                }
            }
        }
    }
    Err(io::Error::new(last.kind(), format!("no place for a temporary directory (/dev/shm, $TMPDIR): {last}")))
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

/// The other side of a token.
#[derive(Debug)]
pub(super) struct EndWatch {
    watch: OwnedFd,
}

impl EndWatch {
    /// Whether the ring that held the token is gone.
    fn has_ended(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.watch, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// A ring that is closed and may still have I/O under way.
///
/// Dropping it gives up watching, not waiting: a thread of its own holds what the I/O needs until the real end.
#[derive(Clone, Debug)]
pub struct RingEnd {
    progress: Arc<Progress>,
    closed: Instant,
}

#[derive(Debug, Default)]
struct Progress {
    ended_after: Mutex<Option<Duration>>,
    changed: Condvar,
}

/// A ring's I/O has not ended within the time given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "I/O of the ring is still under way {} ms after it was closed: the disk is slow or does not answer; the guest's \
     memory stays in use until it ends",
    .since_close.as_millis()
)]
pub struct StillRunning {
    /// Time since the ring was closed.
    pub since_close: Duration,
}

impl RingEnd {
    /// Drops `ring` and waits on a thread of its own for the end, then drops `keepalive`.
    ///
    /// Not on the caller's thread: closing a ring blocks while its SQ thread is in the middle of a batch.
    pub(super) fn start(watch: Option<EndWatch>, ring: Keepalive, keepalive: Keepalive) -> Self {
        let progress = Arc::new(Progress::default());
        let end = Self { progress: progress.clone(), closed: Instant::now() };
        let closed = end.closed;
        let wait = move || {
            drop(ring);
            if let Some(watch) = watch {
                wait_for_end(&watch, closed);
            }
            drop(keepalive);
            *progress.ended_after.lock().unwrap_or_else(PoisonError::into_inner) = Some(closed.elapsed());
            progress.changed.notify_all();
        };
        spawn_or_run("ringpass-end", wait);
        end
    }

    /// Whether the ring and all of its I/O have ended.
    pub fn has_ended(&self) -> bool {
        self.ended_after().is_some()
    }

    /// How long after its closing the ring ended, once it has.
    pub fn ended_after(&self) -> Option<Duration> {
        *self.progress.ended_after.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end, at most for `timeout`. Returns how long after the closing it came.
    ///
    /// # Errors
    ///
    /// [`StillRunning`]: the guest's memory must not be reused, and the requests not be issued again. Waiting can go on.
    pub fn wait(&self, timeout: Duration) -> Result<Duration, StillRunning> {
        let guard = self.progress.ended_after.lock().unwrap_or_else(PoisonError::into_inner);
        let (ended_after, _) = self
            .progress
            .changed
            .wait_timeout_while(guard, timeout, |ended_after| ended_after.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        ended_after.ok_or_else(|| StillRunning { since_close: self.closed.elapsed() })
    }
}

/// Returns when the ring is gone; never before, whatever happens.
fn wait_for_end(watch: &EndWatch, closed: Instant) {
    let mut pause = POLL_MIN;
    let mut remind = REMIND;
    loop {
        match watch.has_ended() {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "cannot tell whether a ring has ended: its memory stays in use"),
        }
        if closed.elapsed() > remind {
            tracing::warn!(
                seconds = closed.elapsed().as_secs(),
                "a closed ring still has I/O under way; its guest memory stays in use until the disk answers"
            );
            remind += REMIND;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(POLL_MAX);
    }
}

/// Runs `work` on a thread of its own; where no thread can be had, here: late is better than too early.
fn spawn_or_run(name: &str, work: impl FnOnce() + Send + 'static) {
    let work = Arc::new(Mutex::new(Some(work)));
    let take = |work: &Mutex<Option<_>>| work.lock().unwrap_or_else(PoisonError::into_inner).take();
    let theirs = work.clone();
    let spawned = thread::Builder::new().name(name.into()).spawn(move || {
        if let Some(work) = take(&theirs) {
            work();
        }
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread to wait for a ring's end: waiting here");
        if let Some(work) = take(&work) {
            work();
        }
    }
}
