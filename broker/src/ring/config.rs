//! Geometry and limits of a ring.

use std::num::NonZeroU32;

use super::RingError;

/// `IORING_MAX_ENTRIES`.
const SQ_ENTRIES_MAX: u32 = 32768;
/// `IORING_MAX_CQ_ENTRIES`.
const CQ_ENTRIES_MAX: u32 = 65536;

/// The size of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Submission queue entries: a power of two, 1 to 32768.
    pub sq_entries: u32,
    /// Completion queue entries: a power of two, `sq_entries` to 65536. The most requests that an honest guest has
    /// outstanding.
    pub cq_entries: u32,
}

impl RingConfig {
    /// Refuses a geometry that io_uring would round or refuse.
    pub(crate) fn check(self) -> Result<(), RingError> {
        let Self { sq_entries, cq_entries } = self;
        if !sq_entries.is_power_of_two() || sq_entries > SQ_ENTRIES_MAX {
            let field = "sq_entries";
            return Err(RingError::Entries { field, entries: sq_entries, min: 1, max: SQ_ENTRIES_MAX, hint: "" });
        }
        if !cq_entries.is_power_of_two() || cq_entries < sq_entries || cq_entries > CQ_ENTRIES_MAX {
            return Err(RingError::Entries {
                field: "cq_entries",
                entries: cq_entries,
                min: sq_entries,
                max: CQ_ENTRIES_MAX,
                hint: " (not fewer than sq_entries)",
            });
        }
        Ok(())
    }
}

/// The most io-wq workers that a ring's submitter may have, per kind (`IORING_REGISTER_IOWQ_MAX_WORKERS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoWorkers {
    /// For work that is certain to end: reads and writes of regular files and block devices.
    pub bounded: NonZeroU32,
    /// For all other work. A disk causes none.
    pub unbounded: NonZeroU32,
}

impl Default for IoWorkers {
    /// Eight and one: enough to keep a disk busy, too few to exhaust the PIDs of a control group.
    fn default() -> Self {
        Self { bounded: NonZeroU32::new(8).expect("not zero"), unbounded: NonZeroU32::MIN }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(sq_entries: u32, cq_entries: u32) -> String {
        RingConfig { sq_entries, cq_entries }.check().unwrap_err().to_string()
    }

    #[test]
    fn a_geometry_that_io_uring_would_round_is_refused_by_name() {
        assert_eq!(refusal(0, 8), "sq_entries is 0: it must be a power of two from 1 to 32768");
        assert_eq!(refusal(24, 64), "sq_entries is 24: it must be a power of two from 1 to 32768");
        assert_eq!(refusal(65536, 65536), "sq_entries is 65536: it must be a power of two from 1 to 32768");
        let few = "cq_entries is 32: it must be a power of two from 64 to 65536 (not fewer than sq_entries)";
        assert_eq!(refusal(64, 32), few);
        assert!(refusal(8, 131072).starts_with("cq_entries is 131072"));
    }

    #[test]
    fn a_cq_may_be_far_larger_than_its_sq() {
        RingConfig { sq_entries: 8, cq_entries: 65536 }.check().unwrap();
    }
}
