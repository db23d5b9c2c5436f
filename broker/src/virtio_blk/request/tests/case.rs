//! One request in a guest's memory, for the tests of single rules.

use vm_memory::GuestAddress;

use super::super::*;
use crate::virtio_blk::fuzzing::{HEADER_GPA, Scene, check, place};
use crate::virtio_blk::{BlkConfig, BlkParameters, DiscardLimits, WriteZeroesLimits};

/// A part of the scene's memory that nothing else uses.
pub(super) const DATA_GPA: u64 = 0x1_1000;
pub(super) const STATUS_GPA: u64 = 0x1_0800;
pub(super) const RANGE_GPA: u64 = 0x1_0900;

pub(super) const READABLE: bool = false;
pub(super) const WRITABLE: bool = true;

pub(super) const HEADER: (u64, u32, bool) = (HEADER_GPA, 16, READABLE);
pub(super) const STATUS: (u64, u32, bool) = (STATUS_GPA, 1, WRITABLE);

pub(super) fn limits(change: impl FnOnce(&mut BlkParameters)) -> RequestLimits {
    let mut parameters = BlkParameters {
        size_bytes: 1 << 20,
        logical_block_bytes: 512,
        physical_block_bytes: 512,
        read_only: false,
        num_queues: 1,
        queue_size: 128,
        serial: Default::default(),
        discard: Some(DiscardLimits { max_sectors: 64, alignment_sectors: 1 }),
        write_zeroes: Some(WriteZeroesLimits { max_sectors: 32, may_unmap: true }),
    };
    change(&mut parameters);
    BlkConfig::new(parameters).unwrap().request_limits()
}

/// One request in a guest's memory. Defaults are what a driver would send.
pub(super) struct Case {
    pub(super) request_type: u32,
    pub(super) sector: u64,
    pub(super) range: (u64, u32, u32),
    pub(super) buffers: Vec<(u64, u32, bool)>,
    pub(super) limits: RequestLimits,
    pub(super) driver_features: u64,
    pub(super) room: usize,
}

impl Case {
    pub(super) fn new(request_type: u32, sector: u64, data: &[(u64, u32, bool)]) -> Self {
        let buffers = [&[HEADER], data, &[STATUS]].concat();
        Self {
            request_type,
            sector,
            range: (0, 0, 0),
            buffers,
            limits: limits(|_| ()),
            driver_features: u64::MAX,
            room: 16,
        }
    }

    pub(super) fn read(sector: u64, len_bytes: u32) -> Self {
        Self::new(VIRTIO_BLK_T_IN, sector, &[(DATA_GPA, len_bytes, WRITABLE)])
    }

    pub(super) fn write(sector: u64, len_bytes: u32) -> Self {
        Self::new(VIRTIO_BLK_T_OUT, sector, &[(DATA_GPA, len_bytes, READABLE)])
    }

    pub(super) fn discard(sector: u64, sectors: u32, flags: u32) -> Self {
        let case = Self::new(VIRTIO_BLK_T_DISCARD, 0, &[(RANGE_GPA, 16, READABLE)]);
        Self { range: (sector, sectors, flags), ..case }
    }

    pub(super) fn write_zeroes(sector: u64, sectors: u32, flags: u32) -> Self {
        Self { request_type: VIRTIO_BLK_T_WRITE_ZEROES, ..Self::discard(sector, sectors, flags) }
    }

    pub(super) fn limits(self, change: impl FnOnce(&mut BlkParameters)) -> Self {
        Self { limits: limits(change), ..self }
    }

    pub(super) fn buffers(self, buffers: &[(u64, u32, bool)]) -> Self {
        Self { buffers: buffers.to_vec(), ..self }
    }

    pub(super) fn features(self, driver_features: u64) -> Self {
        Self { driver_features, ..self }
    }

    /// The result, and the data as (guest-physical address, length).
    pub(super) fn parse(&self) -> (Parsed, Vec<(u64, usize)>) {
        self.parse_with_direct(self.buffers.len())
    }

    /// The same with all descriptors but the first few in an indirect table.
    pub(super) fn parse_with_direct(&self, direct: usize) -> (Parsed, Vec<(u64, usize)>) {
        self.run(Scene::new(), direct)
    }

    /// The same in memory that already has contents.
    pub(super) fn parse_in(&self, scene: Scene) -> (Parsed, Vec<(u64, usize)>) {
        self.run(scene, self.buffers.len())
    }

    fn run(&self, mut scene: Scene, direct: usize) -> (Parsed, Vec<(u64, usize)>) {
        scene.put_header(GuestAddress(HEADER_GPA), self.request_type, self.sector);
        let (sector, sectors, flags) = self.range;
        scene.put_range(GuestAddress(RANGE_GPA), sector, sectors, flags);
        place(&scene, 3, &self.buffers, direct);
        let mut segments = SegmentList::with_capacity(self.room);
        let parsed = check(&mut scene, 3, &self.limits, self.driver_features, &mut segments);
        let data = segments.iter().map(|segment| (segment.gpa.0, segment.len_bytes)).collect();
        (parsed, data)
    }

    pub(super) fn request(&self) -> Request {
        match self.parse().0 {
            Parsed::Request(request) => request,
            other => panic!("no request: {other:?}"),
        }
    }

    pub(super) fn refusal(&self) -> Refusal {
        match self.parse().0 {
            Parsed::Answer(answer) => answer.refusal.expect("a refusal"),
            other => panic!("no answer: {other:?}"),
        }
    }

    pub(super) fn unanswerable(&self) -> Unanswerable {
        match self.parse().0 {
            Parsed::Malformed(error) => error,
            other => panic!("not malformed: {other:?}"),
        }
    }
}
