//! The configuration space of the device (VIRTIO 1.2, 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

/// Length of the configuration space up to `write_zeroes_may_unmap` and its padding.
pub(super) const BYTES: usize = 60;

/// The features that this driver knows.
pub(super) const FEATURES: u64 = 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// A disk, as its device describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Geometry {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Positions and lengths are multiples of this number of bytes.
    pub logical_block_bytes: u32,
    /// The disk refuses writes.
    pub is_read_only: bool,
    /// A completed write may be lost in a power failure before a flush.
    pub has_write_cache: bool,
    /// Maximum length of one discard in bytes. 0: the device does not discard.
    pub discard_bytes_max: u64,
    /// Maximum length of one "write zeroes" request in bytes. 0: the device does not write zeroes.
    pub write_zeroes_bytes_max: u64,
    /// Maximum length of one data segment on a virtqueue in bytes.
    pub(super) segment_bytes_max: u32,
    /// Maximum number of data segments in one request: 1 if the device gives none, as in Linux's driver.
    pub(super) segments_max: u32,
}

impl Geometry {
    /// Reads the configuration space. Bytes behind the end of `space` count as zero.
    pub(super) fn read(space: &[u8], features: u64) -> Self {
        let number = |offset: usize, bytes: usize| {
            (0..bytes).rev().fold(0_u64, |sum, n| sum << 8 | u64::from(space.get(offset + n).copied().unwrap_or(0)))
        };
        let has = |feature: u32| features & 1 << feature != 0;
        let bytes = |feature, offset| if has(feature) { number(offset, 4) * 512 } else { 0 };
        let if_has = |feature, offset, otherwise: u32| match has(feature) {
            true => u32::try_from(number(offset, 4)).unwrap_or(otherwise).max(1),
            false => otherwise,
        };
        Self {
            size_bytes: number(0, 8).saturating_mul(512),
            logical_block_bytes: if_has(VIRTIO_BLK_F_BLK_SIZE, 20, 512),
            is_read_only: has(VIRTIO_BLK_F_RO),
            has_write_cache: has(VIRTIO_BLK_F_FLUSH),
            discard_bytes_max: bytes(VIRTIO_BLK_F_DISCARD, 36),
            write_zeroes_bytes_max: bytes(VIRTIO_BLK_F_WRITE_ZEROES, 48),
            segment_bytes_max: if_has(VIRTIO_BLK_F_SIZE_MAX, 8, u32::MAX),
            segments_max: if_has(VIRTIO_BLK_F_SEG_MAX, 12, 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_reads_only_fields_whose_features_are_negotiated() {
        let mut space = [0; BYTES];
        space[..8].copy_from_slice(&2048_u64.to_le_bytes());
        space[8..12].copy_from_slice(&65536_u32.to_le_bytes());
        space[12..16].copy_from_slice(&126_u32.to_le_bytes());
        space[20..24].copy_from_slice(&4096_u32.to_le_bytes());
        space[36..40].copy_from_slice(&16_u32.to_le_bytes());
        space[48..52].copy_from_slice(&32_u32.to_le_bytes());
        let all = Geometry::read(&space, !(1 << VIRTIO_BLK_F_SIZE_MAX));
        let expected = Geometry {
            size_bytes: 1 << 20,
            logical_block_bytes: 4096,
            is_read_only: true,
            has_write_cache: true,
            discard_bytes_max: 8192,
            write_zeroes_bytes_max: 16384,
            segment_bytes_max: u32::MAX,
            segments_max: 126,
        };
        assert_eq!(all, expected);
        let with_size_max = Geometry::read(&space, 1 << VIRTIO_BLK_F_SIZE_MAX);
        assert_eq!((with_size_max.segment_bytes_max, with_size_max.segments_max), (65536, 1));
        let none = Geometry::read(&space, 0);
        assert_eq!((none.logical_block_bytes, none.discard_bytes_max, none.is_read_only), (512, 0, false));
        assert_eq!(Geometry::read(&[], u64::MAX).size_bytes, 0);
    }
}
