//! Ctrl-C: what is under way ends, and the program says how far it came. It ends in any case: a thread of its own takes the signals,
//! and does not wait for the rest of the program for long.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, Signal};

/// How long the program may take to end by itself after the first signal. Whatever it waits for then (the server, a pipe) may never
/// come.
const GRACE: Duration = Duration::from_secs(2);

static IS_INTERRUPTED: AtomicBool = AtomicBool::new(false);
static MOVED_BYTES: AtomicU64 = AtomicU64::new(0);

/// From now on SIGINT and SIGTERM are noticed by [`check`], and end the program when it does not end by itself. A second one ends it at
/// once. To be called while there is one thread.
pub(crate) fn watch() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block().context("blocking signals")?;
    let take = move || {
        while signals.wait().is_err() {}
        IS_INTERRUPTED.store(true, Ordering::Relaxed);
        thread::spawn(|| {
            thread::sleep(GRACE);
            end();
        });
        while signals.wait().is_err() {}
        end();
    };
    thread::Builder::new().name("signals".into()).spawn(take).context("starting the thread for Ctrl-C")?;
    Ok(())
}

/// Notes how far a copy is.
pub(crate) fn note_moved(moved_bytes: u64) {
    MOVED_BYTES.store(moved_bytes, Ordering::Relaxed);
}

/// # Errors
///
/// The program is to end.
pub(crate) fn check() -> Result<()> {
    ensure!(!IS_INTERRUPTED.load(Ordering::Relaxed), "{}", text());
    Ok(())
}

fn text() -> String {
    format!("interrupted after {} bytes", MOVED_BYTES.load(Ordering::Relaxed))
}

fn end() {
    eprintln!("ringpass-dd: {}", text());
    std::process::exit(2);
}
