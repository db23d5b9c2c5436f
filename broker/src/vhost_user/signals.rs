//! Turns signals of the process into calls to the server.
//!
//! The server takes every signal whose default action ends a process (signal(7)), because that end would leave socket
//! files behind. The effect of each signal:
//!
//! - SIGTERM and SIGINT stop the server: it waits for I/O under way. A second one that comes within [`SAME_REQUEST`] of
//!   the first is the same request (`timeout(1)` sends two); a later one ends the process at once.
//! - SIGQUIT ends the process at once. It leaves no core dump.
//! - SIGXCPU stops the server: the process has passed the soft limit of CPU time, and the hard limit is about to kill
//!   it.
//! - SIGHUP makes the server look at the size of the disk.
//! - All others mean nothing to a server, which ignores them.
//!
//! Ending at once does not wait for I/O, exits with status 1, and removes the socket files. A process cannot take
//! SIGKILL, and this one does not take faults (SIGSEGV, SIGABRT, …); the next start replaces the files that these
//! leave.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use tracing::{info, warn};

use super::server::ServerHandle;
use crate::process_end::end_process;

/// A second SIGTERM or SIGINT within this time of the first is the same request.
const SAME_REQUEST: Duration = Duration::from_secs(1);

/// The signals that a server leaves alone: faults, which belong to the thread that causes them; job control; signals
/// that are ignored by default; and signals that cannot be blocked.
const NOT_TAKEN: [Signal; 16] = [
    Signal::SIGABRT,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGSEGV,
    Signal::SIGSYS,
    Signal::SIGTRAP,
    Signal::SIGCONT,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGCHLD,
    Signal::SIGURG,
    Signal::SIGWINCH,
    Signal::SIGKILL,
    Signal::SIGSTOP,
];

/// The signals that would end the process, blocked so that they do not.
#[derive(Debug)]
pub struct Signals {
    taken: SigSet,
}

/// What the process does on a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Stop,
    SameRequest,
    EndAtOnce,
    RefreshCapacity,
    Ignore,
}

impl Signals {
    /// Blocks the signals in this thread and in all threads that it starts from now on. Call this before there are
    /// other threads.
    ///
    /// # Errors
    ///
    /// The kernel refuses, which no known kernel does.
    pub fn block() -> io::Result<Self> {
        // Also blocks the realtime signals, which end a process by default. `Signal` does not know them, so no thread
        // waits for them: they stay pending, which has no effect.
        let mut blocked = SigSet::all();
        for signal in NOT_TAKEN {
            blocked.remove(signal);
        }
        blocked.thread_block()?;
        Ok(Self { taken: Signal::iterator().filter(|signal| !NOT_TAKEN.contains(signal)).collect() })
    }

    /// Starts a thread that takes the signals, as described in the module documentation.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub fn spawn(self, server: ServerHandle) -> io::Result<()> {
        thread::Builder::new().name("signals".to_owned()).spawn(move || self.forward(&server)).map(|_| ())
    }

    fn forward(&self, server: &ServerHandle) {
        let mut stopping_since = None;
        loop {
            let signal = match self.taken.wait() {
                Ok(signal) => signal,
                Err(errno) => {
                    warn!(%errno, "waiting for a signal failed: trying again");
                    continue;
                }
            };
            match action(signal, stopping_since.map(|since: Instant| since.elapsed())) {
                Action::Stop => {
                    info!("{signal}: stopping");
                    stopping_since = Some(Instant::now());
                    server.stop();
                }
                Action::SameRequest => info!("{signal} ignored: it repeats the same request within {SAME_REQUEST:?}"),
                Action::EndAtOnce => {
                    warn!("{signal}: ending at once, without waiting for I/O");
                    end_process(1);
                }
                Action::RefreshCapacity => {
                    info!("{signal}: looking at the size of the disk");
                    server.refresh_capacity();
                }
                Action::Ignore => info!("{signal} ignored: it means nothing to this program"),
            }
        }
    }
}

/// The action on a signal. `stopping_for`: how long ago the server was told to stop, if it was.
fn action(signal: Signal, stopping_for: Option<Duration>) -> Action {
    match (signal, stopping_for) {
        (Signal::SIGQUIT, _) => Action::EndAtOnce,
        (Signal::SIGTERM | Signal::SIGINT | Signal::SIGXCPU, None) => Action::Stop,
        (Signal::SIGTERM | Signal::SIGINT, Some(ago)) if ago > SAME_REQUEST => Action::EndAtOnce,
        (Signal::SIGTERM | Signal::SIGINT, Some(_)) => Action::SameRequest,
        (Signal::SIGHUP, _) => Action::RefreshCapacity,
        _ => Action::Ignore,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_early_second_signal_is_ignored_and_a_later_one_ends_the_process() {
        let (soon, later) = (Duration::from_millis(1), SAME_REQUEST * 2);
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            assert_eq!(action(signal, None), Action::Stop);
            assert_eq!(action(signal, Some(soon)), Action::SameRequest);
            assert_eq!(action(signal, Some(later)), Action::EndAtOnce);
        }
        for stopping_for in [None, Some(soon), Some(later)] {
            assert_eq!(action(Signal::SIGQUIT, stopping_for), Action::EndAtOnce);
            assert_eq!(action(Signal::SIGHUP, stopping_for), Action::RefreshCapacity);
            assert_eq!(action(Signal::SIGUSR1, stopping_for), Action::Ignore);
        }
        // SIGXCPU comes once a second.
        assert_eq!(action(Signal::SIGXCPU, Some(later)), Action::Ignore);
    }
}
