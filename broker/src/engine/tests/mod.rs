//! Tests that drive an engine through rings in memory, as a guest would.

mod driver;
mod requests;
mod rig;
