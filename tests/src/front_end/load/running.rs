//! A load on a thread of its own.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;

use super::Load;

/// A load on a thread of its own.
#[derive(Debug)]
pub struct RunningLoad {
    thread: JoinHandle<Result<Load>>,
    stop: Arc<AtomicBool>,
    completed: Arc<AtomicU64>,
}

impl RunningLoad {
    /// Starts the load on a new thread.
    pub fn start(mut load: Load) -> Self {
        let (stop, completed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(load.completed())));
        let (told, shown) = (stop.clone(), completed.clone());
        let thread = thread::spawn(move || {
            load.run_while(|completed| {
                shown.store(completed, Ordering::Relaxed);
                !told.load(Ordering::Relaxed)
            })?;
            Ok(load)
        });
        Self { thread, stop, completed }
    }

    /// Completed requests so far.
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    /// Waits until this many more requests have completed, or the load has failed. [`finish`](Self::finish) returns the
    /// error.
    pub fn wait_for_progress(&self, requests: u64) {
        let end = self.completed() + requests;
        while self.completed() < end && !self.thread.is_finished() {
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Whether the load has ended by itself, which is a failure.
    pub fn has_failed(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the outstanding requests, and returns the load.
    ///
    /// # Errors
    ///
    /// The load has failed.
    pub fn finish(self) -> Result<Load> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the load panicked"))?
    }
}
