//! The broker's own questions to the kernel, compiled here as well. With a dependency on the broker, the static program
//! would need a second build of the broker and of all its dependencies.

#[path = "../../../broker/src/kernel/release.rs"]
mod release;
#[path = "../../../broker/src/kernel/support.rs"]
mod support;
#[path = "../../../broker/src/kernel/version.rs"]
mod version;

pub use release::{KernelRelease, ReleaseError};
pub use support::support;
pub use version::{KernelVersion, Stage};
