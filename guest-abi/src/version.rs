//! The version of the interface.

/// The version that this crate implements. Version 0 is not frozen: both sides must implement the same state of it.
pub const VERSION: u16 = 0;
