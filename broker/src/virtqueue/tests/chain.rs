//! Walks along descriptor chains, valid and invalid.

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::driver::{DESC_TABLE, Driver, FREE, INDIRECT, MEMORY_BYTES, NEXT, WRITE};
use crate::virtqueue::{ChainError, DescriptorChain};

/// The chain from `head` on: address and length of each descriptor, and the error that ended the walk.
fn walk(driver: &Driver, head: u16) -> (Vec<(u64, u32)>, Option<ChainError>) {
    walk_in(&driver.memory, driver.size, head)
}

fn walk_in(memory: &GuestMemoryMmap, size: u16, head: u16) -> (Vec<(u64, u32)>, Option<ChainError>) {
    let mut buffers = Vec::new();
    let mut chain = DescriptorChain::new(memory, GuestAddress(DESC_TABLE), size, head);
    while let Some(item) = chain.next() {
        match item {
            Ok(descriptor) => buffers.push((descriptor.addr().0, descriptor.len())),
            Err(error) => {
                assert!(chain.next().is_none(), "nothing follows an error");
                return (buffers, Some(error));
            }
        }
    }
    assert!(chain.next().is_none(), "the end stays the end");
    (buffers, None)
}

#[test]
fn a_chain_is_followed_through_the_table() {
    let driver = Driver::new(8);
    driver.descriptor(DESC_TABLE, 6, 0x100, 16, NEXT, 1);
    driver.descriptor(DESC_TABLE, 1, 0x200, 4096, NEXT | WRITE, 4);
    driver.descriptor(DESC_TABLE, 4, u64::MAX, 1, WRITE, 77);
    assert_eq!(walk(&driver, 6), (vec![(0x100, 16), (0x200, 4096), (u64::MAX, 1)], None));
}

#[test]
fn a_descriptor_is_read_unchanged() {
    let driver = Driver::new(8);
    driver.descriptor(DESC_TABLE, 3, 0x0123_4567_89ab_cdef, 0x7654_3210, 0xfff8 | WRITE, 0xfedc);
    let mut chain = DescriptorChain::new(&driver.memory, GuestAddress(DESC_TABLE), 8, 3);
    let descriptor = chain.next().expect("one").expect("in memory");
    assert_eq!(descriptor.addr(), GuestAddress(0x0123_4567_89ab_cdef));
    assert_eq!((descriptor.len(), descriptor.flags(), descriptor.next()), (0x7654_3210, 0xfff8 | WRITE, 0xfedc));
    assert!(chain.next().is_none());
}

#[test]
fn an_indirect_table_may_have_any_alignment() {
    // 0x..1 is not aligned to words, but VIRTIO allows it; the write flag of the reference has no meaning.
    for table in [FREE, FREE + 1, FREE + 8] {
        let driver = Driver::new(8);
        driver.descriptor(DESC_TABLE, 0, 0x100, 16, NEXT, 5);
        driver.descriptor(DESC_TABLE, 5, table, 48, INDIRECT | WRITE, 0);
        driver.descriptor(table, 0, 0x200, 1, NEXT, 2);
        driver.descriptor(table, 2, 0x300, 2, NEXT, 1);
        driver.descriptor(table, 1, 0x400, 3, WRITE, 0);
        assert_eq!(walk(&driver, 0), (vec![(0x100, 16), (0x200, 1), (0x300, 2), (0x400, 3)], None), "{table:#x}");
    }
}

#[test]
fn an_indirect_table_across_two_regions_is_followed() {
    let half = MEMORY_BYTES / 2;
    let halves = [(GuestAddress(0), half as usize), (GuestAddress(half), half as usize)];
    let memory = GuestMemoryMmap::from_ranges(&halves).expect("guest memory");
    let driver = Driver { memory, ..Driver::new(8) };
    // The second of its three descriptors crosses the boundary.
    let table = half - 24;
    driver.descriptor(DESC_TABLE, 0, table, 48, INDIRECT, 0);
    for index in 0..3 {
        let flags = if index < 2 { NEXT } else { 0 };
        driver.descriptor(table, index, 0x100 * u64::from(index), 7, flags, index + 1);
    }
    assert_eq!(walk(&driver, 0), (vec![(0, 7), (0x100, 7), (0x200, 7)], None));
}

#[test]
fn broken_chains_end_with_their_error() {
    let table = FREE;
    let loops = Driver::new(4);
    loops.descriptor(DESC_TABLE, 0, 1, 1, NEXT, 1);
    loops.descriptor(DESC_TABLE, 1, 2, 1, NEXT, 0);
    let (buffers, error) = walk(&loops, 0);
    assert_eq!(buffers.len(), 4, "each entry of the table may come once");
    assert_eq!(error, Some(ChainError::Loop { table_entries: 4 }));

    let outside = Driver::new(4);
    outside.descriptor(DESC_TABLE, 0, 1, 1, NEXT, 4);
    assert_eq!(walk(&outside, 0).1, Some(ChainError::IndexOutOfRange { index: 4, table_entries: 4 }));
    assert_eq!(walk(&outside, 9).1, Some(ChainError::IndexOutOfRange { index: 9, table_entries: 4 }));

    let nested = Driver::new(4);
    nested.descriptor(DESC_TABLE, 0, table, 32, INDIRECT, 0);
    nested.descriptor(table, 0, 1, 1, NEXT, 1);
    nested.descriptor(table, 1, table, 32, INDIRECT, 0);
    assert_eq!(walk(&nested, 0), (vec![(1, 1)], Some(ChainError::IndirectInIndirect)));

    let both = Driver::new(4);
    both.descriptor(DESC_TABLE, 0, table, 32, INDIRECT | NEXT, 1);
    assert_eq!(walk(&both, 0), (vec![], Some(ChainError::IndirectWithNext)));

    let loop_inside = Driver::new(4);
    loop_inside.descriptor(DESC_TABLE, 0, table, 16, INDIRECT, 0);
    loop_inside.descriptor(table, 0, 1, 1, NEXT, 0);
    assert_eq!(walk(&loop_inside, 0), (vec![(1, 1)], Some(ChainError::Loop { table_entries: 1 })));

    let long = Driver::new(4);
    for index in 0..3 {
        long.descriptor(DESC_TABLE, index, 0, 1 << 31, NEXT, index + 1);
    }
    assert_eq!(walk(&long, 0), (vec![(0, 1 << 31), (0, 1 << 31)], Some(ChainError::TooManyBytes)));
}

#[test]
fn an_indirect_table_has_a_valid_number_of_whole_descriptors() {
    for (size, len_bytes, entries_max) in [
        (4, 0, 1024),
        (4, 15, 1024),
        (4, 40, 1024),
        (4, 1025 * 16, 1024),
        (4, u32::MAX - 15, 1024),
        (4096, 4097 * 16, 4096),
    ] {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).expect("guest memory");
        let driver = Driver { memory, ..Driver::new(size) };
        driver.descriptor(DESC_TABLE, 0, 0x2_0000, len_bytes, INDIRECT, 0);
        assert_eq!(walk(&driver, 0), (vec![], Some(ChainError::IndirectLength { len_bytes, entries_max })));
    }
}

#[test]
fn a_chain_of_1024_may_lie_in_an_indirect_table_of_a_small_queue() {
    let driver = Driver::new(4);
    driver.descriptor(DESC_TABLE, 0, FREE, 1024 * 16, INDIRECT, 0);
    for index in 0..1024 {
        driver.descriptor(FREE, index, index.into(), 1, if index < 1023 { NEXT } else { 0 }, index + 1);
    }
    let (buffers, error) = walk(&driver, 0);
    assert_eq!((buffers.len(), error), (1024, None));
}

#[test]
fn an_indirect_table_outside_memory_is_an_error() {
    for gpa in [MEMORY_BYTES, MEMORY_BYTES - 8, u64::MAX, u64::MAX - 15] {
        let driver = Driver::new(4);
        driver.descriptor(DESC_TABLE, 0, gpa, 32, INDIRECT, 0);
        assert_eq!(walk(&driver, 0), (vec![], Some(ChainError::OutsideMemory { gpa })));
    }
    // Only the second entry is missing.
    let driver = Driver::new(4);
    driver.descriptor(DESC_TABLE, 0, MEMORY_BYTES - 16, 32, INDIRECT, 0);
    driver.descriptor(MEMORY_BYTES - 16, 0, 5, 5, NEXT, 1);
    assert_eq!(walk(&driver, 0), (vec![(5, 5)], Some(ChainError::OutsideMemory { gpa: MEMORY_BYTES })));
}

/// A reference model of a chain: it reads all tables first and then follows them.
fn reference(memory: &GuestMemoryMmap, size: u16, head: u16) -> (Vec<(u64, u32)>, bool) {
    let read = |gpa: u128| -> Option<Descriptor> { memory.read_obj(GuestAddress(u64::try_from(gpa).ok()?)).ok() };
    let table = |gpa: u64, entries: u32| -> Vec<Option<Descriptor>> {
        (0..entries).map(|index| read(u128::from(gpa) + 16 * u128::from(index))).collect()
    };
    let mut entries = table(DESC_TABLE, size.into());
    let (mut buffers, mut index, mut steps, mut bytes, mut is_indirect) = (Vec::new(), head, 0, 0_u64, false);
    loop {
        let Some(Some(descriptor)) = entries.get(usize::from(index)) else { return (buffers, false) };
        steps += 1;
        let (len, flags) = (descriptor.len(), descriptor.flags());
        if steps > entries.len() {
            return (buffers, false);
        }
        if flags & INDIRECT != 0 {
            let limit = 1024.max(u32::from(size));
            if is_indirect || flags & NEXT != 0 || len % 16 != 0 || len == 0 || len / 16 > limit {
                return (buffers, false);
            }
            (entries, index, steps, is_indirect) = (table(descriptor.addr().0, len / 16), 0, 0, true);
            continue;
        }
        bytes += u64::from(len);
        if bytes > 1 << 32 {
            return (buffers, false);
        }
        buffers.push((descriptor.addr().0, len));
        if flags & NEXT == 0 {
            return (buffers, true);
        }
        index = descriptor.next();
    }
}

/// A descriptor as a hostile driver may write it, mostly pointing at the tables of the test.
fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let gpa = prop_oneof![
        4 => (0..8_u64).prop_map(|index| FREE + 16 * index),
        1 => (0..64_u64).prop_map(|back| MEMORY_BYTES - back),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => (0..10_u32).prop_map(|entries| 16 * entries), 1 => any::<u32>()];
    let flags = prop_oneof![6 => 0..4_u16, 2 => Just(INDIRECT), 1 => any::<u16>()];
    let next = prop_oneof![6 => 0..9_u16, 1 => any::<u16>()];
    (gpa, len, flags, next)
}

proptest! {
    #[test]
    fn every_chain_is_walked_like_the_reference(
        direct in prop::collection::vec(any_descriptor(), 8),
        indirect in prop::collection::vec(any_descriptor(), 16),
        head in 0..9_u16,
    ) {
        let driver = Driver::new(8);
        for (index, &(addr, len, flags, next)) in (0..).zip(&direct) {
            driver.descriptor(DESC_TABLE, index, addr, len, flags, next);
        }
        for (index, &(addr, len, flags, next)) in (0..).zip(&indirect) {
            driver.descriptor(FREE, index, addr, len, flags, next);
        }
        let (buffers, error) = walk(&driver, head);
        prop_assert_eq!((buffers, error.is_none()), reference(&driver.memory, 8, head));
    }
}
