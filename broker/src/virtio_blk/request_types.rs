//! The request types that the device executes, depending on the negotiated features.

use ringpass_guest_abi::request::RequestType;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::Refusal;

/// One request type, and the feature that it belongs to.
struct Rule {
    request_type: u32,
    feature: Option<Feature>,
}

struct Feature {
    bit: u32,
    name: &'static str,
    /// What the device does if the feature was not negotiated.
    without: Without,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Without {
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
const RULES: [Rule; 6] = [
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

/// The request types that the device executes for one driver: a bit for each number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestTypes(u32);

impl RequestTypes {
    /// The types for a driver that accepted these features.
    pub fn negotiated(driver_features: u64) -> Self {
        let is_executed = |rule: &&Rule| match &rule.feature {
            None => true,
            Some(feature) => feature.without == Without::Execute || driver_features & 1 << feature.bit != 0,
        };
        Self(RULES.iter().filter(is_executed).fold(0, |types, rule| types | 1 << rule.request_type))
    }

    /// Refuses a type that the device does not execute for this driver.
    #[inline]
    pub(super) fn check(self, request_type: u32) -> Result<(), Refusal> {
        let is_executed = self.0.checked_shr(request_type).is_some_and(|types| types & 1 == 1);
        if is_executed { Ok(()) } else { Err(refusal(request_type)) }
    }
}

/// Why the device refuses a type that the driver may not use.
#[cold]
pub(super) fn refusal(request_type: u32) -> Refusal {
    let rule = RULES.iter().find(|rule| rule.request_type == request_type);
    match rule.and_then(|rule| rule.feature.as_ref()) {
        Some(feature) => Refusal::NotNegotiated { request_type, feature: feature.name },
        None => Refusal::UnknownType { request_type },
    }
}

/// The type, if the device or `docs/abi.md` defines it.
pub(super) fn known_type(request_type: u32) -> Option<u32> {
    let is_known = RULES.iter().any(|rule| rule.request_type == request_type);
    (is_known || RequestType::from_number(request_type).is_some()).then_some(request_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// VIRTIO 1.2, 5.2.6, and the legacy interface: all numbers that ever had a meaning, and their neighbours.
    fn types() -> impl Iterator<Item = u32> {
        (0..64).chain([0x7270_0000, 0x7fff_ffff, 0x8000_0000, 0x8000_0001, u32::MAX])
    }

    #[test]
    fn a_type_with_a_feature_needs_it_and_others_are_always_executed() {
        let all = [VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        for chosen in 0..1 << all.len() {
            let has = |number: u32| chosen >> number & 1 == 1;
            // Other features have no influence.
            let others = !all.iter().fold(0, |bits, bit| bits | 1_u64 << bit);
            for noise in [0, others] {
                let features =
                    (0..3).filter(|&number| has(number)).fold(noise, |bits, number| bits | 1 << all[number as usize]);
                let types_of_driver = RequestTypes::negotiated(features);
                for request_type in types() {
                    let (is_executed, feature) = match request_type {
                        0 | 1 | 4 | 8 => (true, None),
                        11 => (has(1), Some("VIRTIO_BLK_F_DISCARD")),
                        13 => (has(2), Some("VIRTIO_BLK_F_WRITE_ZEROES")),
                        _ => (false, None),
                    };
                    let expected = match (is_executed, feature) {
                        (true, _) => Ok(()),
                        (false, Some(feature)) => Err(Refusal::NotNegotiated { request_type, feature }),
                        (false, None) => Err(Refusal::UnknownType { request_type }),
                    };
                    assert_eq!(types_of_driver.check(request_type), expected, "{request_type:#x}, {features:#x}");
                }
            }
        }
    }

    #[test]
    fn the_causes_of_a_guests_errors_are_few() {
        let known = (0..1 << 16).chain(0x7270_0000..0x7271_0000).filter(|&number| known_type(number).is_some()).count();
        assert_eq!(known, RULES.len() + RequestType::ALL.len());
    }
}
