use super::*;
use crate::virtio_blk::{BlkParameters, DiscardLimits, WriteZeroesLimits};

const EVERYTHING: u64 = u64::MAX;
/// The front-end has all queues of the device.
const QUEUES: u16 = 4;

fn parameters() -> BlkParameters {
    BlkParameters {
        size_bytes: 64 << 20,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        read_only: false,
        num_queues: 4,
        queue_size: 256,
        serial: "disk-7".parse().expect("a serial number"),
        discard: Some(DiscardLimits { max_sectors: 4096, alignment_sectors: 8 }),
        write_zeroes: Some(WriteZeroesLimits { max_sectors: 4096, may_unmap: true }),
    }
}

/// What a driver was told that accepts those of these features that the device offers.
fn record(parameters: BlkParameters, accepted: u64) -> DeviceRecord {
    let device = BlkConfig::new(parameters).expect("a device");
    DeviceRecord::new(&device, accepted & device.device_features())
}

fn compare(now: BlkParameters) -> Result<Continuity, String> {
    record(parameters(), EVERYTHING).compare(&record(now, 0), QUEUES).map_err(|changed| changed.to_string())
}

#[test]
fn a_record_is_parsed_and_other_bytes_are_ignored() {
    let record = record(parameters(), EVERYTHING);
    let bytes = record.to_bytes();
    assert!(bytes.len() <= crate::virtqueue::DEVICE_RECORD_MAX_BYTES);
    assert_eq!(DeviceRecord::from_bytes(&bytes), Some(record));
    assert_eq!(DeviceRecord::from_bytes(&bytes[1..]), None);
    assert_eq!(DeviceRecord::from_bytes(&[]), None);
}

#[test]
fn a_driver_goes_on_with_the_same_or_a_larger_device() {
    assert_eq!(compare(parameters()), Ok(Continuity::Same));
    for more in [
        BlkParameters { num_queues: 256, ..parameters() },
        BlkParameters { queue_size: 1024, ..parameters() },
        BlkParameters { physical_block_bytes: 512, ..parameters() },
        BlkParameters { discard: Some(DiscardLimits { max_sectors: 8192, alignment_sectors: 1 }), ..parameters() },
    ] {
        assert_eq!(compare(more), Ok(Continuity::Same), "{more:?}");
    }
    assert_eq!(compare(BlkParameters { size_bytes: 65 << 20, ..parameters() }), Ok(Continuity::Larger));
}

#[test]
fn a_changed_device_is_refused_with_the_option_that_restores_it() {
    for (now, expected) in [
        (
            BlkParameters { logical_block_bytes: 4096, ..parameters() },
            "logical block: 512 bytes before the restart, 4096 bytes now (--logical-block-size 512)",
        ),
        (
            BlkParameters { num_queues: 2, ..parameters() },
            "queues in use: 4 before the restart, 2 now (--num-queues 4 or more)",
        ),
        (
            BlkParameters { queue_size: 64, ..parameters() },
            "segments of a request: 126 before the restart, 62 now (use the former --queue-size)",
        ),
        (
            BlkParameters { serial: "disk-8".parse().unwrap(), ..parameters() },
            "serial number: \"disk-7\" before the restart, \"disk-8\" now (--serial \"disk-7\")",
        ),
        (
            BlkParameters { read_only: true, ..parameters() },
            "access: read-write before the restart, read-only now (start the server without --read-only)",
        ),
        (
            BlkParameters { size_bytes: 32 << 20, ..parameters() },
            "size of the disk: 67108864 bytes before the restart, 33554432 bytes now (give the disk its size back",
        ),
        (
            BlkParameters { discard: None, ..parameters() },
            "features that the guest uses: VIRTIO_BLK_F_DISCARD before the restart, not offered now (use the former",
        ),
        (
            BlkParameters { discard: Some(DiscardLimits { max_sectors: 8, alignment_sectors: 8 }), ..parameters() },
            "sectors of a discard: 4096 before the restart, 8 now (use the former disk, file system",
        ),
        (
            BlkParameters {
                write_zeroes: Some(WriteZeroesLimits { max_sectors: 4096, may_unmap: false }),
                ..parameters()
            },
            "whether write zeroes may unmap: 1 before the restart, 0 now (use the former disk",
        ),
    ] {
        let refusal = compare(now).expect_err("another device");
        assert!(refusal.contains(expected), "{refusal}\ninstead of {expected}");
        assert!(refusal.contains("The server executes nothing for it. Restart the server as before"), "{refusal}");
    }
    let two = BlkParameters { num_queues: 2, logical_block_bytes: 4096, ..parameters() };
    let refusal = compare(two).expect_err("another device");
    assert!(refusal.contains("(--logical-block-size 512); queues in use: 4"), "it names each difference: {refusal}");
    let was_read_only = record(BlkParameters { read_only: true, ..parameters() }, EVERYTHING);
    let refusal = was_read_only.compare(&record(parameters(), 0), QUEUES).expect_err("another device").to_string();
    assert!(refusal.contains("read-write now (start the server with --read-only)"), "{refusal}");
}

#[test]
fn unused_features_may_disappear() {
    let lost = BlkParameters { discard: None, write_zeroes: None, ..parameters() };
    let without = !(1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES);
    let driver = record(parameters(), without);
    assert_eq!(driver.compare(&record(lost, 0), QUEUES), Ok(Continuity::Same));
    let smaller = DiscardLimits { max_sectors: 8, alignment_sectors: 8 };
    assert_eq!(
        driver.compare(&record(BlkParameters { discard: Some(smaller), ..lost }, 0), QUEUES),
        Ok(Continuity::Same)
    );
}

#[test]
fn a_forged_record_is_printed_as_one_harmless_line() {
    let mut forged = record(parameters(), EVERYTHING).to_bytes();
    let serial = forged.len() - ID_BYTES;
    forged[serial..].copy_from_slice(b"\n\x1b[2Jevil\xff----------");
    forged[8..16].fill(0xff);
    let refusal = DeviceRecord::from_bytes(&forged)
        .unwrap()
        .compare(&record(parameters(), 0), QUEUES)
        .expect_err("forged")
        .to_string();
    assert!(refusal.contains(r#""\n\u{1b}[2Jevil"#), "{refusal}");
    assert!(!refusal.contains(|character: char| character.is_control()), "{refusal}");
}

#[test]
fn unused_queues_and_limits_may_shrink() {
    let record_of = |accepted| record(parameters(), accepted);
    let fewer_queues = record(BlkParameters { num_queues: 2, ..parameters() }, 0);
    assert_eq!(record_of(EVERYTHING).compare(&fewer_queues, 2), Ok(Continuity::Same));
    assert!(record_of(EVERYTHING).compare(&fewer_queues, 3).is_err());
    let shorter_queues = record(BlkParameters { queue_size: 64, ..parameters() }, 0);
    assert!(record_of(EVERYTHING).compare(&shorter_queues, QUEUES).is_err());
    assert_eq!(
        record_of(0).compare(&shorter_queues, QUEUES),
        Ok(Continuity::Same),
        "without SEG_MAX no limit was told"
    );
}
