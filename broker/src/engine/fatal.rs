//! The end of the process where a worker cannot go on.

use std::fmt::Display;

use crate::process_end;

/// Ends the process: otherwise the guest's requests would wait for ever, and no one would notice. The front-end notices the end, and can
/// connect to a new process.
pub(super) fn end_process(why: &dyn Display) -> ! {
    tracing::error!("{why}; the program ends here, so that the front-end can connect to a new one");
    process_end::end_process(1)
}
