//! The restriction policies against the running kernel: a comparison of the checker with it, and a look for SQEs that get
//! out.
//!
//! A crate of its own, with few dependencies, so that the program of it is quickly built a second time, linked
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
