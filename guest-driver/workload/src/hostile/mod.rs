//! The requests that a hostile guest tries on its own ring, and the permitted answers.
//!
//! [`script()`] lists the requests, each with a name and the permitted answers, for a given [`Target`]: the guest's
//! memory layout, its disk, and some addresses of the host to try. [`run_hostile`] submits them one at a time and
//! compares the answers. The script finds only what the *answers* show. The caller must check with canaries that no
//! byte of the host, of another guest or after the end of the disk has changed.
//!
//! The script expects a ring that is restricted by the default direct policy: READ_FIXED and WRITE_FIXED (only
//! READ_FIXED on a read-only disk), flags exactly FIXED_FILE, the disk in slot 0, and a token that accepts no I/O in
//! slot 1.
//!
//! The script omits requests whose success would change the guest's own RAM outside [`Target::buffer_gpa`]. With a
//! writable disk, any byte *of the disk* may change.

mod runner;
mod script;
mod target;

pub use runner::{HostileReport, VIOLATIONS_KEPT, Violation, run_hostile};
pub use script::{Expect, Name, Step, script};
pub use target::{Extent, Reach, Target, TargetError};
