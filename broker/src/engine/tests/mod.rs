//! Tests that drive an engine through rings in memory, as a guest would.

mod disk;
mod driver;
mod front_end;
mod requests;
mod rig;
mod turns;
mod writer;
