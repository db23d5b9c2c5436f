//! The broker's own questions to the kernel, compiled here as well: depending on the broker would mean building it, and all
//! that it needs, a second time for the static program.

#[path = "../../../broker/src/kernel/release.rs"]
mod release;
#[path = "../../../broker/src/kernel/support.rs"]
mod support;
#[path = "../../../broker/src/kernel/version.rs"]
mod version;

pub use release::{KernelRelease, ReleaseError};
pub use support::support;
pub use version::{KernelVersion, Stage};
