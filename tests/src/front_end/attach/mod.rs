//! The driver that gets rings, on a broker's process.

pub mod bench;
pub mod flooder;
pub mod slow;

pub use ringpass_test_utils::{PATIENCE, attach::*, wait_until};
