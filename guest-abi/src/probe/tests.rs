use proptest::prelude::*;

use super::*;

fn good() -> ProbeAnswer {
    ProbeAnswer {
        magic: MAGIC.into(),
        answer_bytes: (ProbeAnswer::BYTES as u32).into(),
        version_min: 1.into(),
        version_max: 3.into(),
        features: (F_DSYNC | 1 << 40).into(),
        sq_entries_max: 4096.into(),
        cq_entries_max: 8192.into(),
        page_bytes: 4096.into(),
        address_align_bytes: 4.into(),
        length_align_bytes: 512.into(),
        segment_bytes_max: (1 << 20).into(),
        queue_count: 4.into(),
        refusal: 0.into(),
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
    assert_eq!((device.version, device.features, device.queue_count), (1, F_DSYNC, 4));
    assert_eq!(device.limits.features, F_DSYNC | 1 << 40);
}

#[test]
fn an_answer_of_zeroes_is_no_ringpass_device() {
    assert_eq!(ProbeAnswer::from_prefix(&[0; 20]).check(), Err(ProbeError::NotRingpass));
}

#[test]
fn a_device_without_this_version_is_refused() {
    let later = ProbeAnswer { version_min: 2.into(), ..good() };
    assert_eq!(later.check(), Err(ProbeError::Version { min: 2, max: 3 }));
    let draft = ProbeAnswer { version_min: 0.into(), version_max: 0.into(), ..good() };
    assert_eq!(draft.check(), Err(ProbeError::Version { min: 0, max: 0 }));
}

#[test]
fn each_field_is_checked() {
    let bad = [
        ("answer_bytes", ProbeAnswer { answer_bytes: 55.into(), ..good() }),
        ("sq_entries_max", ProbeAnswer { sq_entries_max: 65536.into(), ..good() }),
        ("cq_entries_max", ProbeAnswer { cq_entries_max: 3.into(), ..good() }),
        ("page_bytes", ProbeAnswer { page_bytes: 2048.into(), ..good() }),
        ("address_align_bytes", ProbeAnswer { address_align_bytes: 8192.into(), ..good() }),
        ("length_align_bytes", ProbeAnswer { length_align_bytes: 3.into(), ..good() }),
        ("segment_bytes_max", ProbeAnswer { segment_bytes_max: 512.into(), ..good() }),
        ("queue_count", ProbeAnswer { queue_count: 0.into(), ..good() }),
    ];
    for (name, answer) in bad {
        assert!(matches!(answer.check(), Err(ProbeError::Field { field, .. }) if field == name), "{name}");
    }
}

#[test]
fn a_device_says_why_it_gives_no_rings_now() {
    let refusal =
        |number: u16| ProbeAnswer { refusal: number.into(), ..good() }.check().expect("a good answer").refusal;
    assert_eq!(refusal(0), None);
    assert_eq!(refusal(ErrorCode::Inflight as u16), Some(Some(ErrorCode::Inflight)));
    assert_eq!(refusal(999), Some(None), "a code of a later version");
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
