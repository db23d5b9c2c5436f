//! Tests of the restriction policies on the running kernel: a comparison with the checker, and a search for SQEs that
//! escape from a policy.
//!
//! This is a crate of its own with few dependencies, so that cargo quickly builds its program a second time: linked
//! statically, for guests with other kernels.

pub mod canaries;
pub mod differential;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
#[allow(dead_code, unused_imports, unreachable_pub, reason = "written for the crate it belongs to")]
pub mod kernel;
pub mod restricted_ring;
pub mod seed;
pub mod soundness;
