//! What the broker's own threads have in common.

use nix::sys::signal::{SigSet, Signal};

/// Leaves signals to the program's own threads: here they would only interrupt.
///
/// But for those that this thread itself causes. The kernel ends a process that blocks such a one when it comes, and SIGSYS is
/// how a sandbox tells of a system call.
pub(crate) fn leave_signals_to_others() {
    let mut signals = SigSet::all();
    for own in [Signal::SIGSYS, Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP] {
        signals.remove(own);
    }
    // A thread that is interrupted now and then does its work as well.
    let _ = signals.thread_block();
}
