//! Signals of the process as calls to the server.
//!
//! Every signal whose default action ends a process (signal(7)) is taken, because that end would leave socket files behind. What
//! each does:
//!
//! - SIGTERM and SIGINT stop the server: it waits for I/O under way. A second one that comes within [`SAME_REQUEST`] of the first
//!   is the same request (`timeout(1)` sends two); a later one ends the process at once.
//! - SIGQUIT ends the process at once. It leaves no core dump.
//! - SIGXCPU stops the server: the soft limit of CPU time is passed, and the hard one is about to kill.
//! - SIGHUP has the server look at the size of the disk.
//! - All others mean nothing to a server and are ignored.
//!
//! Ending at once does not wait for I/O, exits with status 1, and removes the socket files. SIGKILL cannot be taken, and faults
//! (SIGSEGV, SIGABRT, …) are not; the next start replaces the files that they leave.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use tracing::{info, warn};

use super::server::ServerHandle;
use crate::process_end::end_process;

/// A second SIGTERM or SIGINT within this time of the first is the same request.
const SAME_REQUEST: Duration = Duration::from_secs(1);

/// What a server leaves as it is: faults, which belong to the thread that causes them; job control; what is ignored by default; and
/// what cannot be blocked.
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

/// The signals that would end the process, kept from doing so.
#[derive(Debug)]
pub struct Signals {
    taken: SigSet,
}

/// What is to be done about a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Stop,
    SameRequest,
    EndAtOnce,
    RefreshCapacity,
    Ignore,
}

impl Signals {
    /// Blocks the signals in this thread and in all that it starts from now on: to be called before there are others.
    ///
    /// # Errors
    ///
    /// The kernel refuses, which no known one does.
    pub fn block() -> io::Result<Self> {
        // The realtime signals too, which end a process by default. `Signal` does not know them, so no thread waits for them: they
        // stay pending, which has no effect.
        let mut blocked = SigSet::all();
        for signal in NOT_TAKEN {
            blocked.remove(signal);
        }
        blocked.thread_block()?;
        Ok(Self { taken: Signal::iterator().filter(|signal| !NOT_TAKEN.contains(signal)).collect() })
    }

    /// Starts a thread that takes the signals, as the module says.
    ///
    /// # Errors
    ///
    /// There is no thread to be had.
    pub fn spawn(self, server: ServerHandle) -> io::Result<()> {
        thread::Builder::new().name("signals".to_owned()).spawn(move || self.forward(&server)).map(|_| ())
    }

    fn forward(&self, server: &ServerHandle) {
        let mut stopping_since = None;
        loop {
            let signal = match self.taken.wait() {
                Ok(signal) => signal,
                Err(errno) => {
                    warn!(%errno, "waiting for a signal");
                    continue;
                }
            };
            match order(signal, stopping_since.map(|since: Instant| since.elapsed())) {
                Order::Stop => {
                    info!("{signal}: stopping");
                    stopping_since = Some(Instant::now());
                    server.stop();
                }
                Order::SameRequest => info!("{signal} again within {SAME_REQUEST:?}: the same request"),
                Order::EndAtOnce => {
                    warn!("{signal}: ending at once, without waiting for I/O");
                    end_process(1);
                }
                Order::RefreshCapacity => {
                    info!("{signal}: looking at the size of the disk");
                    server.refresh_capacity();
                }
                Order::Ignore => info!("{signal}: ignored, it means nothing to this program"),
            }
        }
    }
}

/// What a signal orders when the server was told to stop that long ago, if it was.
fn order(signal: Signal, stopping_for: Option<Duration>) -> Order {
    match (signal, stopping_for) {
        (Signal::SIGQUIT, _) => Order::EndAtOnce,
        (Signal::SIGTERM | Signal::SIGINT | Signal::SIGXCPU, None) => Order::Stop,
        (Signal::SIGTERM | Signal::SIGINT, Some(ago)) if ago > SAME_REQUEST => Order::EndAtOnce,
        (Signal::SIGTERM | Signal::SIGINT, Some(_)) => Order::SameRequest,
        (Signal::SIGHUP, _) => Order::RefreshCapacity,
        _ => Order::Ignore,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_signal_is_the_same_request_at_first_and_ends_the_process_later() {
        let (soon, later) = (Duration::from_millis(1), SAME_REQUEST * 2);
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            assert_eq!(order(signal, None), Order::Stop);
            assert_eq!(order(signal, Some(soon)), Order::SameRequest);
            assert_eq!(order(signal, Some(later)), Order::EndAtOnce);
        }
        for stopping_for in [None, Some(soon), Some(later)] {
            assert_eq!(order(Signal::SIGQUIT, stopping_for), Order::EndAtOnce);
            assert_eq!(order(Signal::SIGHUP, stopping_for), Order::RefreshCapacity);
            assert_eq!(order(Signal::SIGUSR1, stopping_for), Order::Ignore);
        }
        // It comes once a second.
        assert_eq!(order(Signal::SIGXCPU, Some(later)), Order::Ignore);
    }
}
