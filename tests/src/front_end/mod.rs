//! The front-end and the driver of `ringpass-test-utils` on a broker's process: what end-to-end tests begin with, and
//! the load that verifies every byte.

pub mod attach;
pub mod load;
pub mod rig;

pub use ringpass_test_utils::{
    blk, descriptor, event,
    front_end::{connection, session, shared, wire},
    ram, vring,
};
