//! The guest's clock.

/// The duration of a tick of the time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TickRate {
    /// Nanoseconds per 2^32 ticks.
    pub(super) ns_per_gigatick: u64,
}

impl TickRate {
    /// The rate of a counter with `khz` thousand ticks per second. `None` for 0, because the clock would never advance.
    pub fn from_khz(khz: u32) -> Option<Self> {
        let ns_per_gigatick = (1_000_000u64 << 32).checked_div(khz.into())?;
        Some(Self { ns_per_gigatick })
    }

    /// Converts `ticks` to nanoseconds.
    pub fn ns(self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.ns_per_gigatick)) >> 32) as u64
    }
}
