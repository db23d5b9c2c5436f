//! Ctrl-C: the program lets the requests under way end, and reports how far it came. It ends in any case: a dedicated
//! thread takes the signals and waits only a short time for the rest of the program.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, Signal};

/// How long the program may take to end by itself after the first signal. It may be waiting for a server or a pipe that
/// never answers.
const GRACE: Duration = Duration::from_secs(2);

static IS_INTERRUPTED: AtomicBool = AtomicBool::new(false);
static MOVED_BYTES: AtomicU64 = AtomicU64::new(0);

/// From now on [`check`] reports SIGINT and SIGTERM, and these signals end the program if it does not end by itself. A
/// second signal ends it at once. Call this while the process has one thread.
pub(crate) fn watch() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block().context("cannot block signals")?;
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
    thread::Builder::new().name("signals".into()).spawn(take).context("cannot start the thread for Ctrl-C")?;
    Ok(())
}

/// Records the progress of a copy.
pub(crate) fn note_moved(moved_bytes: u64) {
    MOVED_BYTES.store(moved_bytes, Ordering::Relaxed);
}

/// # Errors
///
/// A signal has asked the program to end.
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
