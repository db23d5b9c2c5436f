//! Why a queue gets no ring.

use ringpass_guest_abi::attach::AttachError;
use ringpass_guest_abi::request::NO_FIELD;

pub use crate::ring_host::Refused;

/// Why an ATTACH is refused: what the driver gets, and the reason for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::engine) struct AttachRefusal {
    pub(in crate::engine) error: AttachError,
    pub(in crate::engine) why: String,
}

impl From<AttachError> for AttachRefusal {
    fn from(error: AttachError) -> Self {
        Self { error, why: error.to_string() }
    }
}

/// The reason lies in the device, and in no field of the payload.
impl From<Refused> for AttachRefusal {
    fn from(Refused { code, why }: Refused) -> Self {
        Self { error: AttachError { code, field_offset_bytes: NO_FIELD, value: 0 }, why }
    }
}

#[cfg(test)]
mod tests {
    use ringpass_guest_abi::request::ErrorCode;

    use super::*;

    #[test]
    fn an_attach_that_the_device_refuses_as_a_whole_names_no_field_and_keeps_the_reason() {
        let refusal = AttachRefusal::from(Refused { code: ErrorCode::Mode, why: "a reason".into() });
        assert_eq!(refusal.error, AttachError { code: ErrorCode::Mode, field_offset_bytes: NO_FIELD, value: 0 });
        assert_eq!(refusal.why, "a reason");
    }
}
