//! How a request's data is divided into segments on a virtqueue.

use super::Error;
use super::config::Geometry;
use super::virtqueue::Buffer;

/// The data of a request takes at most one descriptor in so many of a queue, so that a request never waits for an empty
/// queue.
const QUEUE_PART: u16 = 4;

/// The segments that a device takes in one request on a virtqueue of a certain size: `size_max` and `seg_max` of its
/// configuration space (VIRTIO 1.2, 5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segments {
    bytes_max: u32,
    request_bytes_max: u32,
}

impl Segments {
    /// The limits of a device for a queue of this size.
    ///
    /// # Errors
    ///
    /// The device takes less than one block in a request.
    pub(super) fn new(geometry: &Geometry, queue_size: u16) -> Result<Self, Error> {
        let &Geometry { logical_block_bytes, segment_bytes_max: bytes_max, segments_max, .. } = geometry;
        let count_max = segments_max.min((queue_size / QUEUE_PART).into()).max(1);
        let bytes = u64::from(bytes_max) * u64::from(count_max);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // A device executes whole blocks only.
        let request_bytes_max = bytes - bytes % logical_block_bytes;
        if request_bytes_max == 0 {
            return Err(Error::BrokenDevice(format!(
                "its configuration space allows {count_max} segments of {bytes_max} bytes in a request (seg_max, size_max), less \
                 than a block of {logical_block_bytes} bytes"
            )));
        }
        Ok(Self { bytes_max, request_bytes_max })
    }

    /// Maximum number of data bytes of one request. The driver sends a longer request in parts.
    pub(super) fn request_bytes_max(&self) -> u32 {
        self.request_bytes_max
    }

    /// The segments of a request's data, which has at most [`request_bytes_max`](Self::request_bytes_max) bytes.
    pub(super) fn of(self, gpa: u64, len_bytes: u32, is_write: bool) -> impl Iterator<Item = Buffer> {
        let starts = (0..len_bytes).step_by(self.bytes_max as usize);
        starts.map(move |start| Buffer {
            gpa: gpa + u64::from(start),
            len_bytes: (len_bytes - start).min(self.bytes_max),
            is_writable: !is_write,
        })
    }

    /// The number of segments of that many bytes.
    pub(super) fn count(self, len_bytes: u32) -> usize {
        len_bytes.div_ceil(self.bytes_max) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(segment_bytes_max: u32, segments_max: u32) -> Geometry {
        Geometry { logical_block_bytes: 4096, segment_bytes_max, segments_max, ..Geometry::read(&[], 0) }
    }

    #[test]
    fn a_request_has_whole_blocks_in_as_many_segments_as_the_device_and_the_queue_allow() {
        let request_bytes_max = |bytes_max, count_max, queue_size| {
            Segments::new(&geometry(bytes_max, count_max), queue_size).unwrap().request_bytes_max()
        };
        assert_eq!(request_bytes_max(4096, 1, 512), 4096);
        assert_eq!(request_bytes_max(4096, 10, 512), 40_960);
        // 15 segments have 7.3 blocks.
        assert_eq!(request_bytes_max(2000, 15, 512), 28_672);
        assert_eq!(request_bytes_max(4096, 1000, 64), 65_536, "a quarter of the queue");
        assert_eq!(request_bytes_max(u32::MAX, 1000, 512), u32::MAX - 4095);
        let error = Segments::new(&geometry(1000, 4), 512).unwrap_err().to_string();
        assert!(
            error.contains("4 segments of 1000 bytes in a request (seg_max, size_max), less than a block"),
            "{error}"
        );
    }

    #[test]
    fn segments_follow_one_another_and_the_last_one_may_be_shorter() {
        let segments = Segments::new(&geometry(3000, 3), 512).unwrap();
        let found: Vec<_> =
            segments.of(1 << 40, 8192, true).map(|part| (part.gpa - (1 << 40), part.len_bytes)).collect();
        assert_eq!(found, [(0, 3000), (3000, 3000), (6000, 2192)]);
        assert_eq!(segments.count(8192), 3);
        assert_eq!(segments.count(3000), 1);
        assert!(segments.of(0, 8192, false).all(|part| part.is_writable));
    }
}
