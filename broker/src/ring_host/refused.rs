//! Why a ring is not made.

use ringpass_guest_abi::request::ErrorCode;

use crate::memory::MemoryError;
use crate::ring::RingError;

/// Why a queue got no ring, or lost its ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The code that the driver got.
    pub code: ErrorCode,
    /// The reason, for people.
    pub why: String,
}

impl From<&RingError> for Refused {
    /// What the driver gets for an error.
    fn from(error: &RingError) -> Self {
        let code = match error {
            RingError::AreaInUse { .. } | RingError::Memory(MemoryError::NotWanted) => ErrorCode::Busy,
            RingError::Memory(
                MemoryError::Memlock(_) | MemoryError::NoMemoryToPin { .. } | MemoryError::System { .. },
            ) => ErrorCode::Resources,
            RingError::Memory(_) => ErrorCode::Memory,
            RingError::FinerBlocks { .. } | RingError::IntegrityProfile { .. } | RingError::UnsafePolicy { .. } => {
                ErrorCode::Mode
            }
            RingError::Create { source, .. } if source.raw_os_error() == Some(nix::libc::EFAULT) => ErrorCode::Memory,
            _ => ErrorCode::Resources,
        };
        Self { code, why: error.to_string() }
    }
}
