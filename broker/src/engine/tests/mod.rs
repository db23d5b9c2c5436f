//! Tests that drive an engine through rings in memory, as a guest would.

pub(super) mod attach;
mod block_driver;
mod builder;
mod discards;
mod disk;
pub(super) mod driver;
mod epochs;
mod finer_blocks;
mod front_end;
mod lengths;
mod negotiation;
mod poll_iterations;
mod requests;
mod rig;
mod ring_driver;
mod ring_ends;
mod ring_memory;
mod writer;
