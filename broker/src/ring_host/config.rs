//! What a device offers to drivers that can have rings.

use ringpass_guest_abi::SLOT_SHIFT_MIN;
use ringpass_guest_abi::attach::AttachLimits;
use ringpass_guest_abi::probe::F_DSYNC;
use ringpass_restrictions::CompiledPolicy;

use crate::direct::DirectConfig;
use crate::ring::{RingConfig, RingError, refuse_unsafe};

/// The largest length of one SQE in bytes. Splitting a transfer into such SQEs costs nothing, and an SQ thread, which
/// copies what is in the page cache, still gets to other queues in between.
pub(crate) const SEGMENT_BYTES_MAX: u32 = 4 << 20;

/// The fewest entries of an SQ and of a CQ that a device offers, however large the slots are: with fewer, a ring would be
/// slower than a virtqueue.
const SQ_ENTRIES_LEAST: u32 = 8;
const CQ_ENTRIES_LEAST: u32 = 64;

/// What a device offers to drivers that can have rings.
///
/// The numbers of entries bound what a hostile guest costs the host ([`limits`](Self::limits)).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AttachConfig {
    /// How rings are executed.
    pub direct: DirectConfig,
    /// What a guest's ring may do.
    pub policy: CompiledPolicy,
    /// The largest number of SQ entries of a ring with slots of 4 MiB: a power of two, 8 to 32768.
    pub sq_entries_max: u32,
    /// The largest number of CQ entries of such a ring: a power of two, at least 64 and at least `sq_entries_max`, at
    /// most 65536.
    pub cq_entries_max: u32,
}

impl AttachConfig {
    /// [`sq_entries_max`](Self#structfield.sq_entries_max) of a new configuration.
    pub const SQ_ENTRIES_MAX_DEFAULT: u32 = 64;
    /// [`cq_entries_max`](Self#structfield.cq_entries_max) of a new configuration.
    pub const CQ_ENTRIES_MAX_DEFAULT: u32 = 1024;

    /// A configuration for rings of at most 64 SQ and 1024 CQ entries. The SQ holds only what the kernel has not
    /// taken yet, and the kernel takes entries as fast as a driver adds them. So 1024 requests can be outstanding.
    ///
    /// # Errors
    ///
    /// [`RingError::UnsafePolicy`] for a policy with lint errors that were not
    /// [accepted](CompiledPolicy::accept_unsafe).
    pub fn new(direct: DirectConfig, policy: CompiledPolicy) -> Result<Self, RingError> {
        refuse_unsafe(&policy)?;
        let (sq_entries_max, cq_entries_max) = (Self::SQ_ENTRIES_MAX_DEFAULT, Self::CQ_ENTRIES_MAX_DEFAULT);
        Ok(Self { direct, policy, sq_entries_max, cq_entries_max })
    }

    /// Sets [`sq_entries_max`](Self#structfield.sq_entries_max) and
    /// [`cq_entries_max`](Self#structfield.cq_entries_max).
    ///
    /// # Errors
    ///
    /// [`RingError::Entries`] for numbers that no ring can have.
    pub fn entries_max(self, sq_entries_max: u32, cq_entries_max: u32) -> Result<Self, RingError> {
        RingConfig { sq_entries: sq_entries_max, cq_entries: cq_entries_max }.check()?;
        Ok(Self { sq_entries_max, cq_entries_max, ..self })
    }

    /// What ATTACH may ask for, for a guest whose slots are this large ([`slot_shift`]).
    ///
    /// One SQE can move as many bytes as a slot has. Where the I/O does not block, the kernel executes what is in the SQ
    /// in one go, and no other thread runs on that CPU meanwhile. For each outstanding request the kernel keeps a
    /// description of the pages, 16 bytes for each page. So both numbers of entries are halved when the size of a slot
    /// doubles, down to 8 and 64. A ring keeps its size if the guest gets more memory later.
    ///
    /// [`slot_shift`]: ringpass_guest_abi::FixedAddressing::slot_shift
    pub fn limits(&self, slot_shift: u32) -> AttachLimits {
        let halvings = slot_shift.saturating_sub(SLOT_SHIFT_MIN);
        let halved = |entries: u32, least: u32| entries.checked_shr(halvings).unwrap_or(0).max(least.min(entries));
        AttachLimits {
            features: F_DSYNC,
            sq_entries_max: halved(self.sq_entries_max, SQ_ENTRIES_LEAST),
            cq_entries_max: halved(self.cq_entries_max, CQ_ENTRIES_LEAST),
            page_bytes: page_bytes(),
        }
    }

    /// The largest length of one SQE in bytes.
    pub fn segment_bytes_max(&self) -> u32 {
        SEGMENT_BYTES_MAX
    }
}

/// The alignment of control page and areas, and the unit of their lengths: the page size of the kernel.
fn page_bytes() -> u32 {
    rustix::param::page_size() as u32
}

#[cfg(test)]
mod tests {
    use ringpass_guest_abi::SLOT_SHIFT_MAX;
    use ringpass_restrictions::{Access, Policy};

    use super::*;
    use crate::direct::SubmissionConfig;
    use crate::kernel;
    use crate::memory::Sharing;

    fn config() -> AttachConfig {
        let policy = Policy::direct(Access::ReadWrite).compile(&kernel::support().unwrap()).unwrap();
        AttachConfig::new(DirectConfig::new(SubmissionConfig::Doorbell, Sharing::Clone), policy).unwrap()
    }

    fn entries(config: &AttachConfig, slot_shift: u32) -> (u32, u32) {
        let AttachLimits { sq_entries_max, cq_entries_max, .. } = config.limits(slot_shift);
        (sq_entries_max, cq_entries_max)
    }

    #[test]
    fn entries_are_halved_when_slots_double_down_to_8_and_64() {
        let of_shift = |shift| entries(&config(), shift);
        assert_eq!([22, 23, 25, 26, 27].map(of_shift), [(64, 1024), (32, 512), (8, 128), (8, 64), (8, 64)]);
        assert_eq!(of_shift(SLOT_SHIFT_MAX), (8, 64));
        // An embedder that wants fewer gets fewer.
        assert_eq!(entries(&config().entries_max(4, 16).unwrap(), SLOT_SHIFT_MAX), (4, 16));
        let refused = config().entries_max(256, 128).unwrap_err().to_string();
        assert!(refused.contains("cq_entries is 128"), "{refused}");
    }

    #[test]
    fn a_batch_has_at_most_512_mib_and_outstanding_requests_take_at_most_32_mib_up_to_a_tebibyte() {
        for shift in SLOT_SHIFT_MIN..=26 {
            let (sq_entries, cq_entries) = entries(&config(), shift);
            let slot_bytes = 1_u64 << shift;
            assert!(u64::from(sq_entries) * slot_bytes <= 512 << 20, "{shift}");
            // 16 bytes for each page, and 4 KiB for everything else.
            assert!(u64::from(cq_entries) * (slot_bytes / 256 + 4096) <= 32 << 20, "{shift}");
        }
    }
}
