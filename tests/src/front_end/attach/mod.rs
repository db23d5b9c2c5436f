//! A driver that gets rings (`docs/abi.md`), one step at a time: honest if it is left alone, and the test may write
//! anything anywhere beside it.

pub mod bench;
mod driver;
mod first_queue;
mod interface;
mod requests;
pub mod slow;
mod words;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

pub use self::{
    driver::{Buffers, CQ_ENTRIES, RingDriver, SQ_ENTRIES},
    first_queue::FirstQueue,
    interface::{Found, Interface, ok, whole},
    words::Words,
};

/// How long anything may take that needs no slow disk: much longer than it does on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until something holds, and looks often.
///
/// # Errors
///
/// It does not come to hold, or `holds` fails.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !holds()? {
        ensure!(Instant::now() < end, "within {PATIENCE:?} it does not happen: {what}");
        thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}
