//! Arbitrary descriptor chains, for fuzzers and property tests.
//!
//! Bytes become a small guest memory with a queue and a chain in it, biased towards chains that are nearly right. The
//! parser parses the chain, and its result must match that of a reference model that works byte by byte.

mod model;
mod scene;

use vm_memory::GuestAddress;

pub(super) use scene::{HEADER_GPA, INDIRECT_GPA, Scene, TABLE_ENTRIES};

use self::model::Expected;
use super::{
    BlkConfig, BlkParameters, DiscardLimits, Parsed, RequestLimits, RequestTypes, SegmentList, WriteZeroesLimits, parse,
};
use crate::fuzzing::Choices;
use virtio_queue::desc::split::Descriptor;

/// Address of the ranges of discard and write zeroes requests.
const RANGE_GPA: u64 = HEADER_GPA + 0x40;

/// Parses the chain that the bytes describe.
///
/// # Panics
///
/// If the result differs from the reference model.
pub fn parse_chain(bytes: &[u8]) {
    parse_and_check(bytes);
}

fn parse_and_check(bytes: &[u8]) -> Parsed {
    let mut choices = Choices::new(bytes);
    let limits = limits(&mut choices);
    // Drivers mostly accept the features that the device offers.
    let driver_features = [u64::MAX, u64::MAX, u64::from(choices.byte()) << 8, 0][choices.below(4)];
    let mut segments = SegmentList::with_capacity([1, 2, 3, 128][choices.below(4)]);
    let mut scene = Scene::new();
    let head = fill(&mut scene, &mut choices);
    check(&mut scene, head, &limits, driver_features, &mut segments)
}

/// Parses one chain and compares it with the model.
pub(super) fn check(
    scene: &mut Scene,
    head: u16,
    limits: &RequestLimits,
    driver_features: u64,
    segments: &mut SegmentList,
) -> Parsed {
    // Before the model looks at memory: the chain's buffers may overlap the available ring.
    scene.offer(head);
    let expected = model::parse(scene, head, limits, driver_features, segments.capacity());
    let parsed = parse(scene.take(), limits, RequestTypes::negotiated(driver_features), segments);
    let data: Vec<_> = segments
        .iter()
        .flat_map(|segment| {
            (0..segment.len_bytes).map(move |n| (segment.gpa.0 + n as u64, segment.hva.wrapping_add(n)))
        })
        .collect();
    let actual = match parsed {
        Parsed::Request(request) => {
            assert_eq!(data.len(), request.data_bytes as usize);
            assert!(segments.iter().all(|segment| segment.len_bytes > 0));
            Expected::Request { request, data }
        }
        Parsed::Answer(answer) => {
            assert!(segments.is_empty());
            assert_eq!(answer.refusal.map_or(super::Status::Ok, super::Refusal::status), answer.status);
            Expected::Answer { status: answer.status, status_gpa: answer.status_gpa, used_bytes: answer.used_bytes() }
        }
        Parsed::AttachRequest(request) => {
            assert_eq!(data.len() as u64, u64::from(request.payload_bytes) + u64::from(request.answer_bytes));
            Expected::AttachRequest { request, data }
        }
        Parsed::Malformed(_) => {
            assert!(segments.is_empty());
            Expected::Malformed
        }
    };
    assert_eq!(actual, expected, "{parsed:?}");
    parsed
}

fn limits(choices: &mut Choices<'_>) -> RequestLimits {
    let flags = choices.byte();
    let max_sectors = [1, 8, 64, u32::MAX][choices.below(4)];
    let parameters = BlkParameters {
        size_bytes: [512 << 10, 1 << 40, !4095][choices.below(3)],
        logical_block_bytes: if flags & 1 != 0 { 4096 } else { 512 },
        physical_block_bytes: 4096,
        read_only: flags & 2 != 0 && flags & 4 != 0,
        num_queues: 1,
        queue_size: 256,
        serial: Default::default(),
        discard: (flags & 8 == 0).then_some(DiscardLimits { max_sectors, alignment_sectors: 1 }),
        write_zeroes: (flags & 16 == 0).then_some(WriteZeroesLimits { max_sectors, may_unmap: flags & 32 != 0 }),
    };
    BlkConfig::new(parameters).expect("the parameters are in their ranges").request_limits()
}

/// Fills guest memory and returns the head of the chain.
///
/// Writes first a request as a driver might send it, in some arrangement of descriptors, and then up to three arbitrary
/// descriptors in place of its own.
fn fill(scene: &mut Scene, choices: &mut Choices<'_>) -> u16 {
    let attach_request = 0x7270_0000 + u32::from(choices.byte() % 16);
    let request_type = [0, 1, 4, 8, 11, 13, choices.byte().into(), u32::MAX, attach_request][choices.below(9)];
    scene.put_header(GuestAddress(HEADER_GPA), request_type, choices.sector());
    let range_sectors = [8, 1, 0, 9, 64, choices.byte().into(), u32::MAX][choices.below(7)];
    let flags = [0, 0, 0, 1, 2, 0x8000_0000][choices.below(6)];
    scene.put_range(GuestAddress(RANGE_GPA), choices.sector(), range_sectors, flags);

    let mut buffers = Vec::with_capacity(TABLE_ENTRIES.into());
    let split = u32::from(choices.byte()) % 32;
    buffers.push((HEADER_GPA, split.min(16), false));
    buffers.push((HEADER_GPA + u64::from(split.min(16)), 16_u32.saturating_sub(split), false));
    for _ in 0..choices.below(4) {
        let gpa = scene::near_a_boundary(choices.byte(), choices.byte());
        match request_type {
            8 => buffers.push((gpa, 20, true)),
            11 | 13 => buffers.push((RANGE_GPA, 16, false)),
            _ => buffers.push((gpa, [4096, 512, 8192, 513][choices.below(4)], request_type != 1)),
        }
    }
    buffers.push((scene::near_a_boundary(choices.byte(), 1), 1, true));

    let head = choices.below(TABLE_ENTRIES.into()) as u16;
    place(scene, head, &buffers, choices.below(2 * buffers.len()));
    for _ in 0..choices.below(4) {
        let table = if choices.below(2) == 0 { scene.table_gpa() } else { GuestAddress(INDIRECT_GPA) };
        let index = (head + choices.below(buffers.len() + 1) as u16) % TABLE_ENTRIES;
        let descriptor = choices.descriptor(index);
        scene.put_descriptor(table, index, descriptor);
    }
    head
}

/// Writes the descriptors of buffers (address, length, whether device-writable): the first few from `head` on in the
/// queue's table, the others in an indirect table.
pub(super) fn place(scene: &Scene, head: u16, buffers: &[(u64, u32, bool)], direct: usize) {
    let (direct, indirect) = buffers.split_at(direct.min(buffers.len()));
    let last = direct.len() + usize::from(!indirect.is_empty()) - 1;
    for (n, &(gpa, len_bytes, is_writable)) in direct.iter().enumerate() {
        let index = (head + n as u16) % TABLE_ENTRIES;
        let flags = u16::from(n < last) | u16::from(is_writable) << 1;
        scene.put_descriptor(
            scene.table_gpa(),
            index,
            Descriptor::new(gpa, len_bytes, flags, (index + 1) % TABLE_ENTRIES),
        );
    }
    if !indirect.is_empty() {
        let index = (head + last as u16) % TABLE_ENTRIES;
        let table_bytes = 16 * indirect.len() as u32;
        scene.put_descriptor(scene.table_gpa(), index, Descriptor::new(INDIRECT_GPA, table_bytes, 4, 0));
    }
    for (n, &(gpa, len_bytes, is_writable)) in indirect.iter().enumerate() {
        let flags = u16::from(n + 1 < indirect.len()) | u16::from(is_writable) << 1;
        scene.put_descriptor(
            GuestAddress(INDIRECT_GPA),
            n as u16,
            Descriptor::new(gpa, len_bytes, flags, n as u16 + 1),
        );
    }
}

impl Choices<'_> {
    fn sector(&mut self) -> u64 {
        match self.below(8) {
            0..=4 => 8 * u64::from(self.byte() % 130),
            5 => self.byte().into(),
            6 => u64::MAX - u64::from(self.byte()),
            _ => self.number(),
        }
    }

    fn descriptor(&mut self, index: u16) -> Descriptor {
        let gpa = match self.below(8) {
            0 => RANGE_GPA,
            1 => INDIRECT_GPA + 16 * u64::from(self.byte() % 4),
            2..=5 => scene::near_a_boundary(self.byte(), self.byte()),
            6 => scene::near_a_boundary(self.byte(), 0),
            _ => self.number(),
        };
        let len_bytes = match self.below(10) {
            0 => 1,
            1 => 16,
            2 => 512,
            3 => 4096,
            4 => [0, 15, 17, 20, 32, 48, 513, 4097][self.below(8)],
            5 => u32::from(self.byte()) * 16,
            6 => u32::from(self.byte()) * 512,
            7 => 511,
            8 => self.byte().into(),
            _ => u32::MAX - u32::from(self.byte()),
        };
        // NEXT is likely, WRITE is set half the time, INDIRECT is rare, and a bit without a meaning is rarer.
        let kind = self.byte();
        let flags = u16::from(kind & 2)
            | u16::from(kind % 3 != 0)
            | (u16::from(kind % 13 == 0) << 2)
            | (u16::from(kind % 37 == 0) << 9);
        let next = if self.below(16) == 0 { u16::from(self.byte()) } else { (index + 1) % TABLE_ENTRIES };
        Descriptor::new(gpa, len_bytes, flags, next)
    }
}

#[cfg(test)]
mod tests;
