use proptest::prelude::*;

use super::*;

const LIMITS: AttachLimits = AttachLimits { features: 1, sq_entries_max: 4096, cq_entries_max: 8192, page_bytes: 4096 };

fn good() -> AttachPayload {
    let area = |gpa: u64| AreaAddress { rings_gpa: gpa.into(), sqes_gpa: (gpa + 0x10000).into() };
    AttachPayload {
        version: VERSION.into(),
        features: 1.into(),
        sq_entries: 256.into(),
        cq_entries: 512.into(),
        control_gpa: 0x10_0000.into(),
        areas: [area(0x20_0000), area(0x30_0000)],
        ..AttachPayload::default()
    }
}

fn code(payload: AttachPayload) -> ErrorCode {
    payload.check(&LIMITS).expect_err("it should be refused").code
}

#[test]
fn a_good_payload_names_five_ranges_of_whole_pages() {
    let geometry = good().check(&LIMITS).expect("a good payload");
    let ranges = geometry.ranges().map(|(field, range)| (field, range.gpa(), range.len_bytes()));
    let rings_bytes = 12288; // 1024 + 512 CQEs of 16 bytes, in pages
    let sqes_bytes = 16384; // 256 SQEs of 64 bytes
    let expected = [
        (24, 0x10_0000, 4096),
        (32, 0x20_0000, rings_bytes),
        (40, 0x21_0000, sqes_bytes),
        (48, 0x30_0000, rings_bytes),
        (56, 0x31_0000, sqes_bytes),
    ];
    assert_eq!(ranges, expected);
}

#[test]
fn larger_pages_make_larger_ranges() {
    let limits = AttachLimits { page_bytes: 65536, ..LIMITS };
    let geometry = good().check(&limits).expect("all of it is aligned to 64 KiB");
    assert!(geometry.ranges().iter().all(|(_, range)| range.len_bytes() == 65536));
}

#[test]
fn each_field_is_refused_with_its_code_and_its_offset() {
    let high = AreaAddress { rings_gpa: ((1u64 << 44) - 4096).into(), ..good().areas[1] };
    let cases = [
        (ErrorCode::Version, 0, AttachPayload { version: 0.into(), ..good() }),
        (ErrorCode::Reserved, 2, AttachPayload { reserved: [0.into(), 0.into(), 1.into()], ..good() }),
        (ErrorCode::Features, 8, AttachPayload { features: 2.into(), ..good() }),
        (ErrorCode::Entries, 16, AttachPayload { sq_entries: 0.into(), ..good() }),
        (ErrorCode::Entries, 16, AttachPayload { sq_entries: 8192.into(), ..good() }),
        (ErrorCode::Entries, 20, AttachPayload { cq_entries: 128.into(), ..good() }),
        (ErrorCode::Entries, 20, AttachPayload { cq_entries: 768.into(), ..good() }),
        (ErrorCode::Alignment, 24, AttachPayload { control_gpa: 0x10_0200.into(), ..good() }),
        (ErrorCode::Range, 48, AttachPayload { areas: [good().areas[0], high], ..good() }),
        (ErrorCode::Overlap, 48, AttachPayload { areas: [good().areas[0]; 2], ..good() }),
        (ErrorCode::Range, 24, AttachPayload { control_gpa: (u64::MAX - 4095).into(), ..good() }),
    ];
    for (code, field_offset_bytes, payload) in cases {
        let error = payload.check(&LIMITS).expect_err("it should be refused");
        assert_eq!((error.code, error.field_offset_bytes), (code, field_offset_bytes));
        assert_eq!(Outcome::from(error).error.get(), code as u32);
    }
}

#[test]
fn ranges_may_touch_and_not_overlap() {
    let control_at = |control_gpa: u64| AttachPayload { control_gpa: control_gpa.into(), ..good() };
    assert!(control_at(0x20_0000 - 4096).check(&LIMITS).is_ok());
    assert!(control_at(0x20_0000 + 12288).check(&LIMITS).is_ok());
    assert_eq!(code(control_at(0x20_0000 + 8192)), ErrorCode::Overlap);
}

#[test]
fn a_short_payload_and_unknown_fields_are_refused() {
    let bytes = good().to_bytes();
    assert_eq!(AttachPayload::parse(&bytes), Ok(good()));
    assert_eq!(AttachPayload::parse(&bytes[1..]).map_err(|error| error.code), Err(ErrorCode::Length));
    let mut longer = bytes.to_vec();
    longer.extend([0, 0, 7]);
    assert_eq!(AttachPayload::parse(&longer).map_err(|error| error.code), Err(ErrorCode::Reserved));
}

/// Addresses that are often near each other.
fn gpa() -> impl Strategy<Value = u64> {
    prop_oneof![8 => (0..64u64).prop_map(|page| page * 4096), 1 => any::<u64>(), 1 => any::<u64>().prop_map(|gpa| gpa & !4095)]
}

proptest! {
    #[test]
    fn accepted_ranges_are_disjoint_aligned_and_below_16_tib(gpas in [gpa(), gpa(), gpa(), gpa(), gpa()], shift in 0..4u32) {
        let [control_gpa, r0, s0, r1, s1] = gpas.map(Le64::new);
        let areas = [AreaAddress { rings_gpa: r0, sqes_gpa: s0 }, AreaAddress { rings_gpa: r1, sqes_gpa: s1 }];
        let entries = 64 << shift;
        let payload = AttachPayload {
            control_gpa, areas, sq_entries: entries.into(), cq_entries: entries.into(), ..good()
        };
        let result = payload.check(&LIMITS);
        let lengths = Lengths::of(entries, entries, 4096).in_order();
        let ends = core::array::from_fn::<_, 5, _>(|i| gpas[i].saturating_add(lengths[i]));
        let apart = (0..5).all(|i| (0..i).all(|j| gpas[i] >= ends[j] || gpas[j] >= ends[i]));
        let fits = (0..5).all(|i| gpas[i] % 4096 == 0 && ends[i] <= 1 << 44);
        prop_assert_eq!(result.is_ok(), apart && fits, "{:?}", result);
    }

    #[test]
    fn any_bytes_are_refused_or_checked(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        if let Ok(payload) = AttachPayload::parse(&bytes) {
            let _ = payload.check(&LIMITS);
        }
    }
}
