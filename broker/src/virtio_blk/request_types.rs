//! The request types that the device executes, depending on the negotiated features.

use super::Refusal;
use super::type_rules::{RULES, Rule, Without};

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

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES};

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
}
