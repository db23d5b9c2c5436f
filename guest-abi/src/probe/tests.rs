use proptest::prelude::*;

use super::*;

fn good() -> ProbeAnswer {
    ProbeAnswer {
        magic: MAGIC.into(),
        answer_bytes: (ProbeAnswer::BYTES as u32).into(),
        version_min: 0.into(),
        version_max: 3.into(),
        features: (F_DSYNC | 1 << 40).into(),
        sq_entries_max: 4096.into(),
        cq_entries_max: 8192.into(),
        page_bytes: 4096.into(),
        segment_align_bytes: 512.into(),
        segment_bytes_max: (1 << 20).into(),
        queue_count: 4.into(),
        reserved: 0.into(),
    }
}

#[test]
fn the_magic_is_the_name() {
    assert_eq!(&good().to_bytes()[..8], b"ringpass");
}

#[test]
fn a_driver_uses_common_features_and_keeps_the_offered_limits() {
    let device = good().check().expect("a good answer");
    assert_eq!((device.version, device.features, device.queue_count), (0, F_DSYNC, 4));
    assert_eq!(device.limits.features, F_DSYNC | 1 << 40);
}

#[test]
fn an_answer_of_zeroes_is_no_ringpass_device() {
    assert_eq!(ProbeAnswer::from_prefix(&[0; 20]).check(), Err(ProbeError::NotRingpass));
}

#[test]
fn a_device_without_this_version_is_refused() {
    let later = ProbeAnswer { version_min: 1.into(), ..good() };
    assert_eq!(later.check(), Err(ProbeError::Version { min: 1, max: 3 }));
}

#[test]
fn each_field_is_checked() {
    let bad = [
        ("answer_bytes", ProbeAnswer { answer_bytes: 47.into(), ..good() }),
        ("sq_entries_max", ProbeAnswer { sq_entries_max: 65536.into(), ..good() }),
        ("cq_entries_max", ProbeAnswer { cq_entries_max: 3.into(), ..good() }),
        ("page_bytes", ProbeAnswer { page_bytes: 2048.into(), ..good() }),
        ("segment_align_bytes", ProbeAnswer { segment_align_bytes: 8192.into(), ..good() }),
        ("segment_bytes_max", ProbeAnswer { segment_bytes_max: 512.into(), ..good() }),
        ("queue_count", ProbeAnswer { queue_count: 0.into(), ..good() }),
    ];
    for (name, answer) in bad {
        assert!(matches!(answer.check(), Err(ProbeError::Field { field, .. }) if field == name), "{name}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_give_limits_that_can_be_used(bytes: [u8; ProbeAnswer::BYTES], length in 0..80usize) {
        let _ = ProbeAnswer::from_prefix(&bytes[..length.min(bytes.len())]).check();
        let with_magic = ProbeAnswer { magic: MAGIC.into(), ..ProbeAnswer::from_bytes(&bytes) };
        prop_assert_eq!(ProbeAnswer::from_bytes(&with_magic.to_bytes()), with_magic);
        if let Ok(device) = with_magic.check() {
            prop_assert!(device.limits.page_bytes >= 4096);
        }
    }
}
