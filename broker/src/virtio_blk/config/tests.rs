//! The rules of the configuration space and the feature bits.

use virtio_bindings::virtio_blk::virtio_blk_config;

use super::*;

fn parameters() -> BlkParameters {
    BlkParameters {
        size_bytes: 1 << 30,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        read_only: false,
        num_queues: 4,
        queue_size: 256,
        serial: "disk-7".parse().unwrap(),
        discard: Some(DiscardLimits { max_sectors: 1 << 16, alignment_sectors: 8 }),
        write_zeroes: Some(WriteZeroesLimits { max_sectors: 1 << 12, may_unmap: true }),
    }
}

fn config(change: impl FnOnce(&mut BlkParameters)) -> BlkConfig {
    let mut parameters = parameters();
    change(&mut parameters);
    BlkConfig::new(parameters).unwrap()
}

fn refused(change: impl FnOnce(&mut BlkParameters)) -> String {
    let mut parameters = parameters();
    change(&mut parameters);
    BlkConfig::new(parameters).unwrap_err().to_string()
}

/// A field of the space, at its offset in the kernel's structure.
macro_rules! field {
    ($config:expr, $field:ident: $integer:ty) => {{
        let offset = std::mem::offset_of!(virtio_blk_config, $field);
        let bytes = $config.to_bytes(true)[offset..][..size_of::<$integer>()].try_into().unwrap();
        <$integer>::from_le_bytes(bytes)
    }};
}

fn features(config: &BlkConfig) -> Vec<u32> {
    (0..64).filter(|bit| config.device_features() & (1 << bit) != 0).collect()
}

#[test]
fn a_writable_disk_offers_all_implemented_features() {
    assert_eq!(
        features(&config(|_| ())),
        [
            1,  // SIZE_MAX
            2,  // SEG_MAX
            6,  // BLK_SIZE
            9,  // FLUSH
            10, // TOPOLOGY
            11, // CONFIG_WCE
            12, // MQ
            13, // DISCARD
            14, // WRITE_ZEROES
            28, // RING_INDIRECT_DESC
            29, // RING_EVENT_IDX
            32, // VERSION_1
        ]
    );
}

#[test]
fn a_read_only_disk_offers_ro_and_no_operation_that_changes_it() {
    let config = config(|parameters| parameters.read_only = true);
    assert_eq!(features(&config), [1, 2, 5, 6, 9, 10, 11, 12, 28, 29, 32]);
    assert!(config.request_limits().read_only());
    assert_eq!(field!(config, max_discard_sectors: u32), 0);
    assert_eq!(field!(config, max_write_zeroes_seg: u32), 0);
    assert_eq!(field!(config, write_zeroes_may_unmap: u8), 0);
}

#[test]
fn operations_that_the_disk_lacks_are_not_offered() {
    let config = config(|parameters| (parameters.discard, parameters.write_zeroes) = (None, None));
    assert_eq!(features(&config), [1, 2, 6, 9, 10, 11, 12, 28, 29, 32]);
    assert_eq!(config.to_bytes(true)[36..], [0; 24]);
}

#[test]
fn each_field_has_its_offset_in_the_kernels_structure() {
    let config = config(|_| ());
    assert_eq!(field!(config, capacity: u64), 1 << 21);
    assert_eq!(field!(config, size_max: u32), 1 << 20);
    assert_eq!(field!(config, seg_max: u32), 126);
    assert_eq!(field!(config, blk_size: u32), 512);
    assert_eq!(field!(config, physical_block_exp: u8), 3);
    assert_eq!(field!(config, alignment_offset: u8), 0);
    assert_eq!(field!(config, min_io_size: u16), 8);
    assert_eq!(field!(config, opt_io_size: u32), 0);
    assert_eq!(field!(config, wce: u8), 1);
    assert_eq!(field!(config, num_queues: u16), 4);
    assert_eq!(field!(config, max_discard_sectors: u32), 1 << 16);
    assert_eq!(field!(config, max_discard_seg: u32), 1);
    assert_eq!(field!(config, discard_sector_alignment: u32), 8);
    assert_eq!(field!(config, max_write_zeroes_sectors: u32), 1 << 12);
    assert_eq!(field!(config, max_write_zeroes_seg: u32), 1);
    assert_eq!(field!(config, write_zeroes_may_unmap: u8), 1);
}

#[test]
fn geometry_and_padding_are_zero() {
    let bytes = config(|_| ()).to_bytes(true);
    assert_eq!(bytes[16..20], [0; 4]);
    assert_eq!(bytes[33], 0);
    assert_eq!(bytes[57..], [0; 3]);
}

#[test]
fn writeback_is_the_value_of_the_cache_mode() {
    assert_eq!(config(|_| ()).to_bytes(false)[32], 0);
    assert_eq!(config(|_| ()).to_bytes(true)[32], 1);
}

#[test]
fn capacity_is_in_sectors() {
    let config = config(|parameters| {
        parameters.logical_block_bytes = 4096;
        parameters.size_bytes = 3 * 4096;
    });
    assert_eq!(config.capacity_sectors(), 24);
    assert_eq!(config.request_limits().capacity_sectors(), 24);
    assert_eq!(field!(config, capacity: u64), 24);
}

#[test]
fn a_new_size_of_whole_blocks_changes_the_capacity() {
    let mut config = config(|parameters| parameters.logical_block_bytes = 4096);
    assert_eq!(config.set_size_bytes(1 << 30), Ok(false));
    assert_eq!(config.set_size_bytes((1 << 30) + 4096), Ok(true));
    assert_eq!(config.request_limits().capacity_sectors(), (1 << 21) + 8);
    assert_eq!(config.set_size_bytes(8192), Ok(true));
    assert_eq!(config.capacity_sectors(), 16);
}

#[test]
fn a_size_that_ends_within_a_block_is_refused_and_the_capacity_stays() {
    let mut config = config(|parameters| parameters.logical_block_bytes = 4096);
    let refused = config.set_size_bytes((1 << 30) + 4608).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the disk has 1073746432 bytes, which is not a multiple of its logical block of 4096 bytes: a guest could not \
         reach the end of it"
    );
    assert_eq!(config.capacity_sectors(), 1 << 21);
}

#[test]
fn a_new_size_below_one_block_is_refused_and_the_capacity_stays() {
    let mut config = config(|parameters| parameters.logical_block_bytes = 4096);
    let refused = config.set_size_bytes(4095).unwrap_err();
    assert_eq!(refused.to_string(), "the disk has 4095 bytes, less than one logical block of 4096 bytes");
    assert_eq!(config.capacity_sectors(), 1 << 21);
}

#[test]
fn a_disk_smaller_than_one_block_is_refused() {
    assert_eq!(
        refused(|parameters| parameters.size_bytes = 511),
        "the disk has 511 bytes, less than one logical block of 512 bytes"
    );
}

#[test]
fn logical_blocks_are_powers_of_two_from_512_to_65536() {
    for logical_block_bytes in [0, 1, 256, 520, 768, 1 << 17, u32::MAX] {
        assert_eq!(
            refused(|parameters| parameters.logical_block_bytes = logical_block_bytes),
            format!(
                "the logical block size of {logical_block_bytes} bytes is invalid: it must be a power of two from 512 \
                 to 65536"
            )
        );
    }
    for logical_block_bytes in [512, 4096, 65536] {
        let config = config(|parameters| parameters.logical_block_bytes = logical_block_bytes);
        assert_eq!(field!(config, blk_size: u32), logical_block_bytes);
    }
}

#[test]
fn a_physical_block_counts_only_if_it_is_larger_and_a_power_of_two() {
    for (logical_block_bytes, physical_block_bytes, exponent, min_io_blocks) in
        [(512, 512, 0, 1), (512, 65536, 7, 128), (4096, 512, 0, 1), (512, 3072, 0, 1), (512, 0, 0, 1)]
    {
        let config = config(|parameters| {
            parameters.logical_block_bytes = logical_block_bytes;
            parameters.physical_block_bytes = physical_block_bytes;
        });
        assert_eq!(
            (field!(config, physical_block_exp: u8), field!(config, min_io_size: u16)),
            (exponent, min_io_blocks)
        );
    }
}

#[test]
fn a_device_without_queues_is_refused() {
    assert_eq!(refused(|parameters| parameters.num_queues = 0), "the device has no queues: it needs at least one");
}

#[test]
fn queue_sizes_are_powers_of_two_from_4_to_32768() {
    for queue_size in [0, 1, 2, 3, 100, 32769, u16::MAX] {
        assert_eq!(
            refused(|parameters| parameters.queue_size = queue_size),
            format!("the queue size of {queue_size} entries is invalid: it must be a power of two from 4 to 32768")
        );
    }
}

#[test]
fn a_request_of_seg_max_segments_fits_into_the_queue_and_into_one_system_call() {
    for queue_size in [4, 64, 128, 256, 1024, 32768] {
        let config = config(|parameters| parameters.queue_size = queue_size);
        let (seg_max, size_max) = (field!(config, seg_max: u32), field!(config, size_max: u32));
        assert!(seg_max >= 1 && seg_max + 2 <= queue_size.into(), "{queue_size}");
        assert!(u64::from(seg_max) * u64::from(size_max) <= (2 << 30) - 4096, "{queue_size}");
        assert!(config.segment_capacity() >= seg_max as usize);
    }
}

/// SeaBIOS 1.16 (`src/hw/virtio-blk.c`) divides the product by the block size, keeps 16 bits, and reads that many
/// blocks at once. If those bits are zero, it reads zero blocks for ever.
#[test]
fn the_firmware_reads_at_least_one_block_at_once() {
    for queue_size in [4, 8, 64, 128, 256, 32768] {
        for block_bytes in [512, 4096, 65536] {
            let config = config(|parameters| {
                parameters.queue_size = queue_size;
                parameters.logical_block_bytes = block_bytes;
            });
            let request_bytes = field!(config, seg_max: u32) * field!(config, size_max: u32);
            assert_ne!((request_bytes / block_bytes) as u16, 0, "{queue_size} entries, {block_bytes} bytes");
        }
    }
}

#[test]
fn range_limits_are_whole_blocks_and_short_enough_for_a_stopping_queue() {
    let config = config(|parameters| {
        parameters.logical_block_bytes = 4096;
        parameters.discard = Some(DiscardLimits { max_sectors: u32::MAX, alignment_sectors: 3 });
        parameters.write_zeroes = Some(WriteZeroesLimits { max_sectors: 31, may_unmap: false });
    });
    assert_eq!(field!(config, max_discard_sectors: u32), 1 << 19);
    assert_eq!(field!(config, discard_sector_alignment: u32), 8);
    assert_eq!(field!(config, max_write_zeroes_sectors: u32), 24);
    assert_eq!(field!(config, write_zeroes_may_unmap: u8), 0);
}

#[test]
fn a_range_limit_below_one_block_withdraws_the_operation() {
    let config = config(|parameters| {
        parameters.logical_block_bytes = 4096;
        parameters.discard = Some(DiscardLimits { max_sectors: 7, alignment_sectors: 1 });
        parameters.write_zeroes = Some(WriteZeroesLimits { max_sectors: 7, may_unmap: false });
    });
    assert_eq!(features(&config), [1, 2, 6, 9, 10, 11, 12, 28, 29, 32]);
}
