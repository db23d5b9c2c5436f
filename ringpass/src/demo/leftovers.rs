//! Files that the demo creates and removes at its end, even if a signal ends it. Only SIGKILL leaves the files behind.
//!
//! A global list contains these files. The demo creates a file and adds it to the list under one lock. The signal
//! thread holds the same lock while it removes all files and ends the process, so no file can appear in between. (Guest
//! processes need no list: they ask the kernel to kill them with their parent.)

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal, raise};

/// The existing files and directories, in the order of their creation.
static MADE: Mutex<BTreeMap<u64, Made>> = Mutex::new(BTreeMap::new());

/// The signals that would end the process and have no other use here. (The virtual machines use a realtime signal.)
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

/// A file or directory; dropping the value removes it.
#[derive(Debug)]
pub(crate) struct Leftover {
    number: u64,
    path: PathBuf,
}

/// Starts the signal thread: from now on a signal that ends the process first removes the listed files. Call this while
/// the process has one thread.
pub(crate) fn remove_at_signals() -> anyhow::Result<()> {
    let signals: SigSet = ENDING.into_iter().collect();
    signals.thread_block().context("cannot block signals")?;
    let wait = move || {
        loop {
            if let Ok(signal) = signals.wait() {
                end(signal);
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(wait).context("cannot start the thread for signals")?;
    Ok(())
}

/// Creates a file at `path` that is removed at the end.
pub(crate) fn file<T>(path: &Path, make: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, Leftover)> {
    let mut list = list();
    let made = make()?;
    Ok((made, Leftover::add(&mut list, Made::File(path.to_owned()))))
}

/// Creates a directory for temporary files that is removed at the end with its content.
pub(crate) fn directory(prefix: &str) -> anyhow::Result<Leftover> {
    let mut list = list();
    let path = tempfile::Builder::new().prefix(prefix).tempdir().context("cannot create a temporary directory")?.keep();
    Ok(Leftover::add(&mut list, Made::Directory(path)))
}

/// Runs `work`, which would leave a file behind if a signal interrupted it. Holds off the signal thread meanwhile.
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

/// Ends the process by `signal`, so that the exit status shows the signal.
fn end(signal: Signal) {
    // Held until the process ends, so that nothing new is created.
    let list = list();
    list.values().rev().for_each(Made::remove);
    // The default action of these signals would leave a core dump.
    let dumps_core = matches!(signal, Signal::SIGQUIT | Signal::SIGXCPU);
    if !dumps_core && [signal].into_iter().collect::<SigSet>().thread_unblock().is_ok() {
        let _ = raise(signal);
    }
    std::process::exit(128 + signal as i32);
}
