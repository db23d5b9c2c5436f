//! Facts about the running kernel: its release, the known holes that a guest's ring could reach, and the operations and
//! restrictions that its io_uring supports.
//!
//! [`KernelRelease`] reads the version, also as distributors write it; [`affected`] lists the known [`Hole`]s of a
//! release; [`KernelRelease::verdict`] is the advice drawn from both. [`support()`] asks the kernel itself which
//! operations and restrictions it supports: by trial and by the kernel's own answers, never by version (except for one
//! errno of refused SQEs). [`lint_context()`] is what the lint of a policy should know of the running kernel.

mod holes;
mod lint;
mod release;
mod support;
mod verdict;
mod version;

pub use holes::{Hole, Reach, affected, known_holes};
pub use lint::{lint_context, nop_hole};
pub use release::{KernelRelease, ReleaseError};
pub use support::support;
pub use verdict::Verdict;
pub use version::{KernelVersion, Stage};
