//! Bounce buffers: for `O_DIRECT` and requests whose place, buffers' addresses or lengths the disk does not take.
//!
//! A request that needs them is carried out piece by piece through one chunk. There are few chunks, so that a guest
//! cannot make the worker use more memory; requests for which there is none wait.

use vm_memory::{GuestMemory, MmapRegion, Permissions, VolatileMemory, VolatileSlice};

use crate::engine::EngineError;
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::SegmentList;

/// Length of a chunk in bytes: a multiple of any block of direct I/O ([`crate::disk::DirectAlignment`]).
pub(super) const CHUNK_BYTES: usize = 128 * 1024;

/// Chunks of a worker. Their memory comes when they are used first.
const CHUNKS: u16 = 8;

/// A chunk that belongs to one request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chunk(u16);

/// The chunks of one worker.
#[derive(Debug)]
pub(in crate::engine) struct BouncePool {
    memory: MmapRegion,
    free: Vec<Chunk>,
}

/// A buffer of the request is not in the guest's memory any more. It was when the request was parsed.
#[derive(Debug)]
pub(super) struct Gone;

impl BouncePool {
    pub(in crate::engine) fn new() -> Result<Self, EngineError> {
        let memory = MmapRegion::new(usize::from(CHUNKS) * CHUNK_BYTES).map_err(EngineError::BounceBuffers)?;
        Ok(Self { memory, free: (0..CHUNKS).map(Chunk).collect() })
    }

    /// A chunk, if one is free.
    pub(super) fn take(&mut self) -> Option<Chunk> {
        self.free.pop()
    }

    /// Gives a chunk back.
    pub(super) fn give_back(&mut self, chunk: Chunk) {
        self.free.push(chunk);
    }

    /// Where a chunk begins: page-aligned, [`CHUNK_BYTES`] long, for as long as the pool lives.
    pub(super) fn address(&self, chunk: &Chunk) -> *mut u8 {
        self.slice(chunk, 0, CHUNK_BYTES).ptr_guard_mut().as_ptr()
    }

    /// Copies `len_bytes` of a request's data into the chunk, from byte `at_bytes` of the chunk and `offset_bytes` of the
    /// data on.
    pub(super) fn fill(
        &self,
        (chunk, at_bytes): (&Chunk, usize),
        (memory, segments): (&DeviceMemory, &SegmentList),
        (offset_bytes, len_bytes): (u64, usize),
    ) -> Result<(), Gone> {
        let mut chunk = self.slice(chunk, at_bytes, len_bytes);
        for_each_piece(memory, segments, Permissions::Read, (offset_bytes, len_bytes), |piece| {
            piece.copy_to_volatile_slice(chunk);
            chunk = chunk.offset(piece.len()).expect("the pieces are as long as the chunk's part together");
        })
    }

    /// The reverse of [`fill`](Self::fill).
    pub(super) fn empty(
        &self,
        (chunk, at_bytes): (&Chunk, usize),
        (memory, segments): (&DeviceMemory, &SegmentList),
        (offset_bytes, len_bytes): (u64, usize),
    ) -> Result<(), Gone> {
        let mut chunk = self.slice(chunk, at_bytes, len_bytes);
        for_each_piece(memory, segments, Permissions::Write, (offset_bytes, len_bytes), |piece| {
            chunk.copy_to_volatile_slice(piece);
            chunk = chunk.offset(piece.len()).expect("the pieces are as long as the chunk's part together");
        })
    }

    fn slice(&self, chunk: &Chunk, at_bytes: usize, len_bytes: usize) -> VolatileSlice<'_> {
        let begin_bytes = usize::from(chunk.0) * CHUNK_BYTES + at_bytes;
        self.memory.get_slice(begin_bytes, len_bytes).expect("a chunk lies within the mapping")
    }
}

/// The bytes `offset_bytes..offset_bytes + len_bytes` of a request's data, in pieces that are contiguous for the host.
fn for_each_piece<'m>(
    memory: &'m DeviceMemory,
    segments: &SegmentList,
    access: Permissions,
    (offset_bytes, len_bytes): (u64, usize),
    mut each: impl FnMut(VolatileSlice<'m>),
) -> Result<(), Gone> {
    let mut skip_bytes = offset_bytes;
    let mut left_bytes = len_bytes;
    for segment in segments.iter() {
        if left_bytes == 0 {
            break;
        }
        let segment_bytes = segment.len_bytes as u64;
        if skip_bytes >= segment_bytes {
            skip_bytes -= segment_bytes;
            continue;
        }
        let part_bytes = (segment_bytes - skip_bytes).min(left_bytes as u64) as usize;
        let gpa = vm_memory::GuestAddress(segment.gpa.0 + skip_bytes);
        for piece in memory.get_slices(gpa, part_bytes, access).map_err(|_| Gone)? {
            each(piece.map_err(|_| Gone)?);
        }
        skip_bytes = 0;
        left_bytes -= part_bytes;
    }
    if left_bytes == 0 { Ok(()) } else { Err(Gone) }
}
