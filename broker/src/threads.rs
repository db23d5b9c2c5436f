//! Common parts of the broker's own threads.

use std::thread;

use nix::sys::signal::{SigSet, Signal};

/// Blocks the signals that the program's own threads handle: here they would only interrupt.
///
/// The exceptions are the signals that this thread itself causes. The kernel ends a process that blocks such a signal
/// when it comes, and a sandbox reports a refused system call by SIGSYS.
pub(crate) fn leave_signals_to_others() {
    let mut signals = SigSet::all();
    for own in [Signal::SIGSYS, Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP] {
        signals.remove(own);
    }
    // If the mask cannot be set, the thread still does its work, with interruptions.
    let _ = signals.thread_block();
}

/// Ends the process if the thread panics: for threads that others wait for.
pub(crate) struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}
