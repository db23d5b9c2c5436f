//! Ctrl-C in a program that has started others: the program ends them, fails where it stands, and cleans up as after any
//! error.

use std::{
    fs,
    sync::atomic::{AtomicI32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use rustix::process::{Pid, kill_process};

/// The number of the signal that has come, or 0.
static CAME: AtomicI32 = AtomicI32::new(0);

/// The times between one look for children and the next: the program may start another child while a look goes on. What
/// does not end then is killed, for example a QEMU that waits for a server which has ended too.
const LOOKS: [Duration; 3] = [Duration::from_millis(300), Duration::from_millis(700), Duration::from_secs(1)];

/// From now on SIGINT, SIGTERM and SIGHUP end the children of this program instead of the program. The caller has no other
/// thread yet.
///
/// # Errors
///
/// The signals cannot be blocked.
pub fn watch() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    // Children start with no signal blocked: std sees to that.
    signals.thread_block().context("cannot block signals")?;
    thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            CAME.store(signal as i32, Ordering::SeqCst);
            for pause in LOOKS {
                end_children(rustix::process::Signal::TERM);
                thread::sleep(pause);
            }
            end_children(rustix::process::Signal::KILL);
        }
    });
    Ok(())
}

/// The number of the signal that has ended the children.
pub fn signal() -> Option<i32> {
    Some(CAME.load(Ordering::SeqCst)).filter(|number| *number != 0)
}

/// Refuses to go on after such a signal.
///
/// # Errors
///
/// A signal has come.
pub fn check() -> Result<()> {
    if signal().is_some() {
        bail!("interrupted");
    }
    Ok(())
}

fn end_children(signal: rustix::process::Signal) {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    for thread in threads {
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        let pids = children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?));
        // A child that has ended keeps its number until it is waited for, and the number is not in use again this soon.
        for pid in pids {
            let _ = kill_process(pid, signal);
        }
    }
}
