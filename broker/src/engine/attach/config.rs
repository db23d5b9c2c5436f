//! What a device offers to drivers that can have rings.

use ringpass_guest_abi::attach::AttachLimits;
use ringpass_guest_abi::probe::F_DSYNC;
use ringpass_restrictions::CompiledPolicy;

use crate::direct::DirectConfig;
use crate::ring::{RingError, refuse_unsafe};

/// The largest length of one SQE in bytes. Splitting a transfer into such SQEs costs nothing, and an SQ thread, which
/// copies what is in the page cache, still gets to other queues in between.
pub(super) const SEGMENT_BYTES_MAX: u32 = 4 << 20;

/// What a device offers to drivers that can have rings.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AttachConfig {
    /// How rings are executed.
    pub direct: DirectConfig,
    /// What a guest's ring may do.
    pub policy: CompiledPolicy,
    /// The largest number of SQ entries of a ring: a power of two, at most 32768.
    pub sq_entries_max: u32,
    /// The largest number of CQ entries of a ring: a power of two, at least `sq_entries_max`, at most 65536.
    pub cq_entries_max: u32,
}

impl AttachConfig {
    /// A configuration for rings of at most 2048 SQ and 4096 CQ entries: twice what front-ends and drivers use for
    /// queues.
    ///
    /// # Errors
    ///
    /// [`RingError::UnsafePolicy`] for a policy with lint errors that were not
    /// [accepted](CompiledPolicy::accept_unsafe).
    pub fn new(direct: DirectConfig, policy: CompiledPolicy) -> Result<Self, RingError> {
        refuse_unsafe(&policy)?;
        Ok(Self { direct, policy, sq_entries_max: 2048, cq_entries_max: 4096 })
    }

    /// What ATTACH may ask for.
    pub fn limits(&self) -> AttachLimits {
        AttachLimits {
            features: F_DSYNC,
            sq_entries_max: self.sq_entries_max,
            cq_entries_max: self.cq_entries_max,
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
