//! Files that the demo makes, and removes however it ends, a signal included. SIGKILL alone leaves them.
//!
//! A list in this process knows them. Each is made and put on the list under one lock, which the thread that takes signals holds when
//! it removes all of them and ends the process: there is no moment in between. (The guest process needs no list: it asks the kernel
//! to be killed with its parent.)

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal, raise};

/// What is on disk, by the order in which it was made.
static MADE: Mutex<BTreeMap<u64, Made>> = Mutex::new(BTreeMap::new());

/// The signals that would end the process and have no other use here. The virtual machines use a realtime signal.
const ENDING: [Signal; 13] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGSTKFLT,
    Signal::SIGXCPU,
];

#[derive(Debug)]
enum Made {
    File(PathBuf),
    Directory(PathBuf),
}

/// A file or directory that is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Leftover {
    number: u64,
    path: PathBuf,
}

/// From now on a signal that ends the process removes what is on the list. To be called while there is one thread.
pub(crate) fn remove_at_signals() -> anyhow::Result<()> {
    let signals: SigSet = ENDING.into_iter().collect();
    signals.thread_block().context("blocking signals")?;
    let wait = move || {
        loop {
            if let Ok(signal) = signals.wait() {
                end(signal);
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(wait).context("starting the thread for signals")?;
    Ok(())
}

/// Makes a file at `path` that is removed at the end.
pub(crate) fn file<T>(path: &Path, make: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, Leftover)> {
    let mut list = list();
    let made = make()?;
    Ok((made, Leftover::add(&mut list, Made::File(path.to_owned()))))
}

/// Makes a directory for temporary files that is removed at the end, with what is in it.
pub(crate) fn directory(prefix: &str) -> anyhow::Result<Leftover> {
    let mut list = list();
    let path = tempfile::Builder::new().prefix(prefix).tempdir().context("making a temporary directory")?.keep();
    Ok(Leftover::add(&mut list, Made::Directory(path)))
}

/// Does something that leaves a file behind only if it is interrupted.
pub(crate) fn uninterrupted<T>(work: impl FnOnce() -> T) -> T {
    let _list = list();
    work()
}

impl Leftover {
    fn add(list: &mut BTreeMap<u64, Made>, made: Made) -> Self {
        let number = list.last_key_value().map_or(0, |(number, _)| number + 1);
        let path = made.path().to_owned();
        list.insert(number, made);
        Self { number, path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Leftover {
    fn drop(&mut self) {
        let mut list = list();
        if let Some(made) = list.remove(&self.number) {
            made.remove();
        }
    }
}

impl Made {
    fn path(&self) -> &Path {
        let (Self::File(path) | Self::Directory(path)) = self;
        path
    }

    fn remove(&self) {
        let removed = match self {
            Self::File(path) => std::fs::remove_file(path),
            Self::Directory(path) => std::fs::remove_dir_all(path),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, "cannot remove {}", self.path().display());
        }
    }
}

fn list() -> MutexGuard<'static, BTreeMap<u64, Made>> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the process by `signal`, so that a shell sees which one it was.
fn end(signal: Signal) {
    // Held until the end: nothing is made any more.
    let list = list();
    list.values().rev().for_each(Made::remove);
    // These would leave a core dump.
    let dumps_core = matches!(signal, Signal::SIGQUIT | Signal::SIGXCPU);
    if !dumps_core && [signal].into_iter().collect::<SigSet>().thread_unblock().is_ok() {
        let _ = raise(signal);
    }
    std::process::exit(128 + signal as i32);
}
