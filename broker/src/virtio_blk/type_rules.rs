//! The table of the device's request types.

use ringpass_guest_abi::request::RequestType;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

/// One request type, and the feature that it belongs to.
pub(super) struct Rule {
    pub(super) request_type: u32,
    pub(super) feature: Option<Feature>,
}

pub(super) struct Feature {
    pub(super) bit: u32,
    pub(super) name: &'static str,
    /// What the device does if the feature was not negotiated.
    pub(super) without: Without,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Without {
    Execute,
    /// Answer VIRTIO_BLK_S_UNSUPP.
    Refuse,
}

/// All request types of the device (VIRTIO 1.2, 5.2.3 and 5.2.6). It answers every other type with UNSUPP, because it
/// does not offer their features (SCSI, LIFETIME, SECURE_ERASE, ZONED, BARRIER).
///
/// Not in this table:
/// - VIRTIO_BLK_F_RO. What counts is whether the device *offers* it (5.2.6.2): the device then answers a write with
///   IOERR, regardless of what the driver accepted. It does not offer DISCARD and WRITE_ZEROES beside it.
/// - The unmap flag of WRITE_ZEROES. It has no feature bit; `write_zeroes_may_unmap` only says whether it has an
///   effect.
/// - The requests in `docs/abi.md`. They have no feature bit, because a front-end would have to know it.
pub(super) const RULES: [Rule; 6] = [
    Rule { request_type: VIRTIO_BLK_T_IN, feature: None },
    Rule { request_type: VIRTIO_BLK_T_OUT, feature: None },
    // Without the feature each write is stable when it completes, and a flush has nothing to do. The device executes it
    // nevertheless, as QEMU and SPDK do: "a write becomes stable once [...] a VIRTIO_BLK_T_FLUSH request is sent after
    // the write is completed and is completed itself" (5.2.6.2) has no condition, and a flush must not fail for a
    // driver that sends one.
    Rule {
        request_type: VIRTIO_BLK_T_FLUSH,
        feature: Some(Feature { bit: VIRTIO_BLK_F_FLUSH, name: "VIRTIO_BLK_F_FLUSH", without: Without::Execute }),
    },
    Rule { request_type: VIRTIO_BLK_T_GET_ID, feature: None },
    Rule {
        request_type: VIRTIO_BLK_T_DISCARD,
        feature: Some(Feature { bit: VIRTIO_BLK_F_DISCARD, name: "VIRTIO_BLK_F_DISCARD", without: Without::Refuse }),
    },
    Rule {
        request_type: VIRTIO_BLK_T_WRITE_ZEROES,
        feature: Some(Feature {
            bit: VIRTIO_BLK_F_WRITE_ZEROES,
            name: "VIRTIO_BLK_F_WRITE_ZEROES",
            without: Without::Refuse,
        }),
    },
];

/// The type, if the device or `docs/abi.md` defines it.
pub(super) fn known_type(request_type: u32) -> Option<u32> {
    let is_known = RULES.iter().any(|rule| rule.request_type == request_type);
    (is_known || RequestType::from_number(request_type).is_some()).then_some(request_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_causes_of_a_guests_errors_are_few() {
        let known = (0..1 << 16).chain(0x7270_0000..0x7271_0000).filter(|&number| known_type(number).is_some()).count();
        assert_eq!(known, RULES.len() + RequestType::ALL.len());
    }
}
