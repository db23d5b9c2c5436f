//! The data buffers of one request, as host addresses.

use nix::libc::{c_void, iovec};
use vm_memory::GuestAddress;

/// The maximum number of entries for one readv(2), writev(2) or io_uring operation (`UIO_MAXIOV`).
const IOVECS_MAX: usize = 1024;

/// A piece of a request's data that is contiguous for the guest and for the host, with at least one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its guest address, which the dirty log uses.
    pub gpa: GuestAddress,
    /// Its host address. Valid as long as the memory that the chain was parsed with.
    pub hva: *mut u8,
    /// Its length in bytes.
    pub len_bytes: usize,
}

/// The data buffers of one request in their order.
///
/// Made once with room for the maximum number of segments, and reused for one request after another without allocation.
/// The addresses are only numbers here. Code that passes them to the kernel must keep the
/// [`DeviceMemory`](crate::vhost_user::DeviceMemory) that the chain was parsed with until the kernel is done.
#[derive(Debug)]
pub struct SegmentList {
    iovecs: Vec<iovec>,
    gpas: Vec<GuestAddress>,
    capacity: usize,
}

impl SegmentList {
    /// A list with room for this many segments: at least 1, and at most 1024, the limit of one system call.
    ///
    /// [`BlkConfig::segment_capacity`](super::BlkConfig::segment_capacity) is enough for the requests that drivers may
    /// send.
    pub fn with_capacity(segments: usize) -> Self {
        let capacity = segments.clamp(1, IOVECS_MAX);
        Self { iovecs: Vec::with_capacity(capacity), gpas: Vec::with_capacity(capacity), capacity }
    }

    /// How many segments there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Number of segments.
    pub fn len(&self) -> usize {
        self.iovecs.len()
    }

    /// True if there is no data.
    pub fn is_empty(&self) -> bool {
        self.iovecs.is_empty()
    }

    /// The segments in the form for readv(2) and similar calls.
    pub fn iovecs(&self) -> &[iovec] {
        &self.iovecs
    }

    /// The segments in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Segment> {
        self.iovecs.iter().zip(&self.gpas).map(|(iovec, &gpa)| Segment {
            gpa,
            hva: iovec.iov_base.cast(),
            len_bytes: iovec.iov_len,
        })
    }

    /// Removes all segments and keeps the room.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        self.gpas.clear();
    }

    /// Appends a segment of at least one byte. A segment that continues the last one, for the guest and for the host,
    /// is merged into it.
    #[inline]
    pub(super) fn push(&mut self, segment: Segment) -> Result<(), NoRoom> {
        if let (Some(last), Some(last_gpa)) = (self.iovecs.last_mut(), self.gpas.last()) {
            let end_hva = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
            let end_gpa = last_gpa.0.wrapping_add(last.iov_len as u64);
            if end_hva == segment.hva && end_gpa == segment.gpa.0 {
                last.iov_len += segment.len_bytes;
                return Ok(());
            }
        }
        if self.iovecs.len() == self.capacity {
            return Err(NoRoom);
        }
        self.iovecs.push(iovec { iov_base: segment.hva.cast::<c_void>(), iov_len: segment.len_bytes });
        self.gpas.push(segment.gpa);
        Ok(())
    }

    /// Keeps the first `len_bytes` bytes and drops the rest.
    pub(super) fn truncate_bytes(&mut self, len_bytes: usize) {
        let mut left_bytes = len_bytes;
        let mut kept = 0;
        for iovec in &mut self.iovecs {
            if left_bytes == 0 {
                break;
            }
            iovec.iov_len = iovec.iov_len.min(left_bytes);
            left_bytes -= iovec.iov_len;
            kept += 1;
        }
        self.iovecs.truncate(kept);
        self.gpas.truncate(kept);
    }
}

/// The list is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoRoom;

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(gpa: u64, hva: usize, len_bytes: usize) -> Segment {
        Segment { gpa: GuestAddress(gpa), hva: std::ptr::without_provenance_mut(hva), len_bytes }
    }

    #[test]
    fn a_segment_that_continues_the_last_is_merged_into_it() {
        let mut list = SegmentList::with_capacity(4);
        list.push(segment(0x1000, 0x7000_1000, 0x200)).unwrap();
        list.push(segment(0x1200, 0x7000_1200, 0x600)).unwrap();
        assert_eq!(list.iter().collect::<Vec<_>>(), [segment(0x1000, 0x7000_1000, 0x800)]);
    }

    #[test]
    fn a_segment_that_continues_the_last_on_one_side_only_stays_separate() {
        let mut list = SegmentList::with_capacity(4);
        list.push(segment(0x1000, 0x7000_1000, 0x1000)).unwrap();
        list.push(segment(0x2000, 0x8000_0000, 0x1000)).unwrap();
        list.push(segment(0x9000, 0x8000_1000, 0x1000)).unwrap();
        assert_eq!(list.len(), 3);
    }

    #[test]
    fn a_full_list_refuses_a_further_segment() {
        let mut list = SegmentList::with_capacity(1);
        list.push(segment(0x1000, 0x7000_0000, 1)).unwrap();
        assert_eq!(list.push(segment(0x3000, 0x7000_2000, 1)), Err(NoRoom));
        list.push(segment(0x1001, 0x7000_0001, 1)).unwrap();
        assert_eq!(list.iter().collect::<Vec<_>>(), [segment(0x1000, 0x7000_0000, 2)]);
    }

    #[test]
    fn a_list_never_has_more_segments_than_one_system_call_takes() {
        let mut list = SegmentList::with_capacity(usize::MAX);
        let pushed = (0..2000).take_while(|n| list.push(segment(n * 0x2000, *n as usize * 0x2000, 1)).is_ok()).count();
        assert_eq!(pushed, 1024);
    }

    #[test]
    fn truncating_cuts_the_segment_at_the_end() {
        let mut list = SegmentList::with_capacity(4);
        list.push(segment(0x1000, 0x7000_0000, 8)).unwrap();
        list.push(segment(0x3000, 0x7000_3000, 8)).unwrap();
        list.push(segment(0x5000, 0x7000_5000, 8)).unwrap();
        list.truncate_bytes(11);
        assert_eq!(list.iter().collect::<Vec<_>>(), [segment(0x1000, 0x7000_0000, 8), segment(0x3000, 0x7000_3000, 3)]);
        list.truncate_bytes(8);
        assert_eq!(list.len(), 1);
        list.truncate_bytes(0);
        assert!(list.is_empty());
    }
}
