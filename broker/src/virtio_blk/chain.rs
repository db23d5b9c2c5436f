//! One walk along a descriptor chain, which finds its header, its data and its status.

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use super::{Refusal, Segment, SegmentList, Unanswerable};
use crate::virtqueue::DescriptorChain;

/// `type`, `reserved` and `sector` of `struct virtio_blk_req` (VIRTIO 1.2, 5.2.6).
pub(super) const HEADER_BYTES: usize = 16;

/// The parts of a chain. The segment list holds its data, readable or writable.
pub(super) struct Chain {
    pub(super) header: [u8; HEADER_BYTES],
    /// Device-readable bytes after the header, and device-writable bytes before the status. A chain has at most 4 GiB
    /// (VIRTIO 1.2, 2.7.5.2).
    pub(super) readable_bytes: u32,
    pub(super) writable_bytes: u32,
    pub(super) status_gpa: GuestAddress,
    /// The first reason not to execute the chain. The segment list is then incomplete.
    pub(super) refusal: Option<Refusal>,
}

impl Chain {
    /// Walks along the descriptors once. Assumes nothing about how they divide header, data and status (VIRTIO 1.2,
    /// 2.7.4.1), and skips descriptors without bytes.
    #[inline]
    pub(super) fn walk(descriptors: DescriptorChain<'_>, segments: &mut SegmentList) -> Result<Self, Unanswerable> {
        let mut walk = Walk {
            memory: Translator::new(descriptors.memory()),
            segments,
            header: [0; HEADER_BYTES],
            readable_bytes: 0,
            writable_bytes: 0,
            last_writable: None,
            refusal: None,
        };
        for descriptor in descriptors {
            let descriptor = descriptor?;
            if descriptor.len() == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                walk.writable(descriptor.addr(), descriptor.len());
            } else {
                walk.readable(descriptor.addr(), descriptor.len());
            }
        }
        walk.finish()
    }
}

struct Walk<'a, 'm> {
    memory: Translator<'m>,
    segments: &'a mut SegmentList,
    header: [u8; HEADER_BYTES],
    readable_bytes: u64,
    writable_bytes: u64,
    /// The last device-writable buffer so far. If no other follows, its last byte is the status.
    last_writable: Option<(GuestAddress, u32)>,
    refusal: Option<Refusal>,
}

impl Walk<'_, '_> {
    fn readable(&mut self, gpa: GuestAddress, len_bytes: u32) {
        let before_bytes = self.readable_bytes;
        self.readable_bytes += u64::from(len_bytes);
        if self.refusal.is_some() {
            return;
        }
        if self.last_writable.is_some() {
            self.refusal = Some(Refusal::ReadableAfterWritable);
            return;
        }
        let read_bytes = match self.header.get_mut(before_bytes as usize..) {
            Some(missing) if !missing.is_empty() => {
                let part_bytes = missing.len().min(len_bytes as usize);
                if !self.memory.read(gpa, &mut missing[..part_bytes]) {
                    self.refusal = Some(Refusal::OutsideMemory { gpa, len_bytes });
                    return;
                }
                part_bytes as u32
            }
            _ => 0,
        };
        if read_bytes < len_bytes {
            self.data(GuestAddress(gpa.0.wrapping_add(read_bytes.into())), len_bytes - read_bytes);
        }
    }

    fn writable(&mut self, gpa: GuestAddress, len_bytes: u32) {
        self.writable_bytes += u64::from(len_bytes);
        if let Some((gpa, len_bytes)) = self.last_writable.replace((gpa, len_bytes)) {
            self.data(gpa, len_bytes);
        }
    }

    fn data(&mut self, gpa: GuestAddress, len_bytes: u32) {
        if self.refusal.is_none() {
            self.refusal = self.memory.segments(gpa, len_bytes, self.segments).err();
        }
    }

    fn finish(mut self) -> Result<Chain, Unanswerable> {
        let (gpa, len_bytes) = self.last_writable.ok_or(Unanswerable::NoStatus)?;
        if len_bytes > 1 {
            self.data(gpa, len_bytes - 1);
        }
        let status_gpa = GuestAddress(gpa.0.wrapping_add(u64::from(len_bytes - 1)));
        if self.memory.find_frame(status_gpa).is_none() {
            return Err(Unanswerable::StatusOutsideMemory { gpa: status_gpa });
        }
        let header_bytes = self.readable_bytes.min(HEADER_BYTES as u64);
        if header_bytes < HEADER_BYTES as u64 && self.refusal.is_none() {
            self.refusal = Some(Refusal::ShortHeader { len_bytes: header_bytes as u32 });
        }
        Ok(Chain {
            header: self.header,
            readable_bytes: u32::try_from(self.readable_bytes - header_bytes).unwrap_or(u32::MAX),
            writable_bytes: u32::try_from(self.writable_bytes - 1).unwrap_or(u32::MAX),
            status_gpa,
            refusal: self.refusal,
        })
    }
}

/// Translates guest-physical addresses to host addresses.
///
/// Remembers one region for the header and the status, which drivers mostly keep together, and one for the data.
struct Translator<'m> {
    memory: &'m GuestMemoryMmap<()>,
    frame: Option<&'m GuestRegionMmap<()>>,
    data: Option<&'m GuestRegionMmap<()>>,
}

/// A region, and an offset inside it.
type Place<'m> = (&'m GuestRegionMmap<()>, u64);

impl<'m> Translator<'m> {
    fn new(memory: &'m GuestMemoryMmap<()>) -> Self {
        Self { memory, frame: None, data: None }
    }

    #[inline]
    fn find_frame(&mut self, gpa: GuestAddress) -> Option<Place<'m>> {
        let place = self.find(gpa, self.frame)?;
        self.frame = Some(place.0);
        Some(place)
    }

    #[inline]
    fn find_data(&mut self, gpa: GuestAddress) -> Option<Place<'m>> {
        let place = self.find(gpa, self.data.or(self.frame))?;
        self.data = Some(place.0);
        Some(place)
    }

    #[inline]
    fn find(&self, gpa: GuestAddress, likely: Option<&'m GuestRegionMmap<()>>) -> Option<Place<'m>> {
        if let Some(region) = likely {
            let offset_bytes = gpa.0.wrapping_sub(region.start_addr().0);
            if offset_bytes < region.len() {
                return Some((region, offset_bytes));
            }
        }
        let region = self.memory.find_region(gpa)?;
        Some((region, gpa.0 - region.start_addr().0))
    }

    /// Copies bytes of the header out of guest memory, once. False if some of them are outside memory.
    #[inline]
    fn read(&mut self, gpa: GuestAddress, bytes: &mut [u8]) -> bool {
        match self.find_frame(gpa) {
            Some((region, offset_bytes)) if bytes.len() as u64 <= region.len() - offset_bytes => region
                .get_slice(MemoryRegionAddress(offset_bytes), bytes.len())
                .is_ok_and(|slice| slice.copy_to(bytes) == bytes.len()),
            // The bytes may continue in the next region.
            Some(_) => self.memory.read_slice(bytes, gpa).is_ok(),
            None => false,
        }
    }

    /// Appends a buffer of at least one byte: one segment, or more if the buffer crosses regions.
    #[inline]
    fn segments(&mut self, gpa: GuestAddress, len_bytes: u32, segments: &mut SegmentList) -> Result<(), Refusal> {
        let outside = Refusal::OutsideMemory { gpa, len_bytes };
        let mut at = gpa;
        let mut left_bytes = u64::from(len_bytes);
        loop {
            let (region, offset_bytes) = self.find_data(at).ok_or(outside)?;
            let here_bytes = left_bytes.min(region.len() - offset_bytes);
            let hva = region.get_host_address(MemoryRegionAddress(offset_bytes)).map_err(|_| outside)?;
            let segment = Segment { gpa: at, hva, len_bytes: here_bytes as usize };
            segments.push(segment).map_err(|_| Refusal::TooManySegments)?;
            left_bytes -= here_bytes;
            if left_bytes == 0 {
                return Ok(());
            }
            at = GuestAddress(at.0.checked_add(here_bytes).ok_or(outside)?);
        }
    }
}
