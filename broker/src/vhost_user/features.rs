//! The names of VIRTIO features.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SECURE_ERASE, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_F_ZONED,
};
use virtio_bindings::virtio_config::{
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

const NAMES: [(u32, &str); 19] = [
    (VIRTIO_BLK_F_SIZE_MAX, "VIRTIO_BLK_F_SIZE_MAX"),
    (VIRTIO_BLK_F_SEG_MAX, "VIRTIO_BLK_F_SEG_MAX"),
    (VIRTIO_BLK_F_GEOMETRY, "VIRTIO_BLK_F_GEOMETRY"),
    (VIRTIO_BLK_F_RO, "VIRTIO_BLK_F_RO"),
    (VIRTIO_BLK_F_BLK_SIZE, "VIRTIO_BLK_F_BLK_SIZE"),
    (VIRTIO_BLK_F_FLUSH, "VIRTIO_BLK_F_FLUSH"),
    (VIRTIO_BLK_F_TOPOLOGY, "VIRTIO_BLK_F_TOPOLOGY"),
    (VIRTIO_BLK_F_CONFIG_WCE, "VIRTIO_BLK_F_CONFIG_WCE"),
    (VIRTIO_BLK_F_MQ, "VIRTIO_BLK_F_MQ"),
    (VIRTIO_BLK_F_DISCARD, "VIRTIO_BLK_F_DISCARD"),
    (VIRTIO_BLK_F_WRITE_ZEROES, "VIRTIO_BLK_F_WRITE_ZEROES"),
    (VIRTIO_BLK_F_SECURE_ERASE, "VIRTIO_BLK_F_SECURE_ERASE"),
    (VIRTIO_BLK_F_ZONED, "VIRTIO_BLK_F_ZONED"),
    (VIRTIO_RING_F_INDIRECT_DESC, "VIRTIO_F_INDIRECT_DESC"),
    (VIRTIO_RING_F_EVENT_IDX, "VIRTIO_F_EVENT_IDX"),
    (VIRTIO_F_VERSION_1, "VIRTIO_F_VERSION_1"),
    (VIRTIO_F_ACCESS_PLATFORM, "VIRTIO_F_ACCESS_PLATFORM"),
    (VIRTIO_F_RING_PACKED, "VIRTIO_F_RING_PACKED"),
    (VIRTIO_F_IN_ORDER, "VIRTIO_F_IN_ORDER"),
];

/// The names of the features in this set, and the numbers of the bits that have no name.
pub(crate) fn feature_names(features: u64) -> String {
    let name = |bit: u32| {
        let named = NAMES.iter().find(|(known, _)| *known == bit);
        named.map_or_else(|| format!("bit {bit}"), |(_, name)| (*name).to_owned())
    };
    (0..u64::BITS).filter(|bit| features & 1 << bit != 0).map(name).collect::<Vec<_>>().join(", ")
}
