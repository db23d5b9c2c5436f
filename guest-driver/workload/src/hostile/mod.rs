//! What a hostile guest tries with a ring it owns, and what must come of it.
//!
//! [`script()`] lists requests one by one, each with a name and the answers that are allowed, for a given [`Target`]:
//! the guest's memory layout, its disk, and some addresses of the host to try. [`run_hostile`] submits them one at a
//! time and compares. The script finds what the *answers* show; that no byte of the host, of another guest or behind
//! the end of the disk has changed is for the caller to look at, with canaries around everything.
//!
//! The ring is expected to be restricted as the default direct policy says: READ_FIXED and WRITE_FIXED (READ_FIXED
//! alone on a read-only disk), flags exactly FIXED_FILE, the disk in slot 0, a token that accepts no I/O in slot 1.
//!
//! Every request whose success would change the guest's own RAM outside [`Target::buffer_gpa`] is left out. With a
//! writable disk, any byte *of the disk* may change.

mod runner;
mod script;
mod target;

pub use runner::{HostileReport, VIOLATIONS_KEPT, Violation, run_hostile};
pub use script::{Expect, Name, Step, script};
pub use target::{Extent, Reach, Target, TargetError};
