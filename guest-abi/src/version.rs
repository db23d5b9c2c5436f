//! The version of the interface.

/// The version that this crate implements. Version 1 is frozen: its meaning never changes. `docs/abi.md` says what may be
/// added, and how.
pub const VERSION: u16 = 1;
