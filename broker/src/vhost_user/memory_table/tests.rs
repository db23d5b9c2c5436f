use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;

const PAGE: u64 = 4096;

fn file(pages: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("memory-table-test", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, pages * PAGE).unwrap();
    fd
}

/// A region whose user addresses are 0x7f0000000000 above its guest addresses.
fn region(gpa: u64, size_bytes: u64, file_offset_bytes: u64) -> RegionDescription {
    RegionDescription { gpa, size_bytes, user_address: 0x7f00_0000_0000 + gpa, file_offset_bytes }
}

fn mapping(table: &MemoryTable, gpa: u64) -> *const u8 {
    table.memory().get_host_address(GuestAddress(gpa)).unwrap()
}

#[test]
fn regions_show_their_files_from_their_offsets() {
    let fd = file(3);
    rustix::io::pwrite(&fd, b"second page", PAGE).unwrap();
    let table = MemoryTable::default().with(region(0x10_0000, 2 * PAGE, PAGE), fd.try_clone().unwrap()).unwrap();
    let memory = table.memory();
    let mut bytes = [0; 11];
    memory.read_slice(&mut bytes, GuestAddress(0x10_0000)).unwrap();
    assert_eq!(&bytes, b"second page");
    memory.write_slice(b"to the third", GuestAddress(0x10_0000 + PAGE)).unwrap();
    let mut written = [0; 12];
    rustix::io::pread(&fd, &mut written, 2 * PAGE).unwrap();
    assert_eq!(&written, b"to the third");
}

#[test]
fn a_region_keeps_its_mapping_unless_its_file_changes() {
    let (first, second) = (file(1), file(1));
    let descriptions = [region(0, PAGE, 0), region(0x10_0000, PAGE, 0)];
    let old =
        MemoryTable::default().replaced(descriptions.into_iter().zip([first.try_clone().unwrap(), second])).unwrap();
    let new = old.replaced(descriptions.into_iter().zip([first, file(1)])).unwrap();
    assert_eq!(mapping(&old, 0), mapping(&new, 0));
    assert_ne!(mapping(&old, 0x10_0000), mapping(&new, 0x10_0000));
    let added = new.with(region(0x20_0000, PAGE, 0), file(1)).unwrap();
    assert_eq!(mapping(&new, 0), mapping(&added, 0));
    let removed = added.without(&descriptions[1]).unwrap();
    assert_eq!(mapping(&new, 0), mapping(&removed, 0));
    assert_eq!(mapping(&added, 0x20_0000), mapping(&removed, 0x20_0000));
}

#[test]
fn an_old_table_stays_usable_while_it_is_held() {
    let table = MemoryTable::default().with(region(0, PAGE, 0), file(1)).unwrap();
    let held = table.memory();
    let empty = table.without(&region(0, PAGE, 0)).unwrap();
    drop(table);
    assert_eq!(empty.memory().num_regions(), 0);
    held.write_slice(&[7], GuestAddress(5)).unwrap();
}

#[test]
fn user_addresses_are_translated_within_one_region() {
    let table = MemoryTable::default()
        .with(region(0, 2 * PAGE, 0), file(2))
        .and_then(|table| table.with(region(2 * PAGE, PAGE, 0), file(1)))
        .unwrap();
    let base = 0x7f00_0000_0000;
    let translate = |offset: u64, size| table.translate(base + offset, size).map(|address| address.0);
    assert_eq!(translate(0, 2 * PAGE), Some(0));
    assert_eq!(translate(PAGE + 16, 100), Some(PAGE + 16));
    assert_eq!(translate(2 * PAGE, PAGE), Some(2 * PAGE));
    assert_eq!(translate(2 * PAGE - 1, 2), None, "across the end of a region");
    assert_eq!(translate(3 * PAGE, 0), None, "behind the last region");
    assert_eq!(table.translate(base - 1, 1), None);
    assert_eq!(table.translate(u64::MAX, u64::MAX), None);
}

fn refusal(result: Result<MemoryTable, MemoryTableError>) -> String {
    result.expect_err("a refusal").to_string()
}

#[test]
fn a_region_beyond_the_end_of_its_file_is_refused() {
    let add = |size_bytes, offset, pages| MemoryTable::default().with(region(PAGE, size_bytes, offset), file(pages));
    assert!(add(PAGE, PAGE, 2).is_ok());
    let text = refusal(add(PAGE + 1, PAGE, 2));
    assert_eq!(text, "the memory region at guest address 0x1000 ends at byte 0x2001 of a file of 0x2000 bytes");
    refusal(add(PAGE, 0, 0));
}

#[test]
fn a_region_that_ends_within_a_page_is_mapped() {
    let fd = file(0);
    rustix::fs::ftruncate(&fd, 100).unwrap();
    let table = MemoryTable::default().with(region(0, 100, 0), fd).unwrap();
    table.memory().write_slice(&[1; 100], GuestAddress(0)).unwrap();
    assert!(table.memory().write_slice(&[1; 101], GuestAddress(0)).is_err());
}

#[test]
fn regions_that_are_empty_or_wrap_around_are_refused() {
    let add = |description| refusal(MemoryTable::default().with(description, file(1)));
    assert_eq!(add(region(PAGE, 0, 0)), "the memory region at guest address 0x1000 is empty");
    let high = 0xffff_ffff_ffff_f000;
    let wrapped = [
        (RegionDescription { gpa: high, size_bytes: PAGE, user_address: 0, file_offset_bytes: 0 }, "guest address"),
        (RegionDescription { gpa: 0, size_bytes: PAGE, user_address: high, file_offset_bytes: 0 }, "user address"),
        (
            RegionDescription { gpa: 0, size_bytes: PAGE, user_address: 0, file_offset_bytes: high },
            "offset in its file",
        ),
    ];
    for (description, field) in wrapped {
        let text = add(description);
        assert!(text.contains(&format!("its {field} and length 0x1000 exceed 64 bits")), "{text}");
    }
}

#[test]
fn overlapping_regions_are_refused_and_adjacent_ones_are_not() {
    let table = MemoryTable::default().with(region(4 * PAGE, 4 * PAGE, 0), file(4)).unwrap();
    for gpa in [PAGE * 7, PAGE * 4, PAGE] {
        let text = refusal(table.with(region(gpa, 4 * PAGE, 0), file(4)));
        assert!(text.contains("overlaps the one at"), "{text}");
    }
    for gpa in [PAGE * 8, 0] {
        table.with(region(gpa, 4 * PAGE, 0), file(4)).unwrap();
    }
    // Two guest addresses of the same memory are allowed.
    let alias = RegionDescription { gpa: PAGE * 100, ..region(4 * PAGE, 4 * PAGE, 0) };
    table.with(alias, file(4)).unwrap();
}

#[test]
fn an_unaligned_file_offset_is_refused() {
    let text = refusal(MemoryTable::default().with(region(0, PAGE, 100), file(2)));
    assert!(text.contains("its offset in its file 0x64 is not a multiple of its file's page size 0x1000"), "{text}");
}

#[test]
fn only_regular_files_hold_memory() {
    let (pipe, _) = rustix::pipe::pipe().unwrap();
    let zero = rustix::fs::open("/dev/zero", OFlags::RDWR, Mode::empty()).unwrap();
    for fd in [pipe, zero] {
        let text = refusal(MemoryTable::default().with(region(0, PAGE, 0), fd));
        assert!(text.starts_with("the memory region at guest address 0x0 is not in a regular file"), "{text}");
    }
}

#[test]
fn a_file_that_is_not_writable_is_refused() {
    let fd = file(1);
    let read_only = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let read_only = rustix::fs::open(read_only, OFlags::RDONLY, Mode::empty()).unwrap();
    let text = refusal(MemoryTable::default().with(region(0, PAGE, 0), read_only));
    assert!(text.starts_with("the memory region at guest address 0x0: mapping it failed: Permission denied"), "{text}");
}

#[test]
fn a_table_holds_512_regions_and_no_more() {
    let fd = file(1);
    let mut table = MemoryTable::default();
    // Only this test shares one file among the regions; a front-end passes a descriptor for each.
    for slot in 0..MAX_REGIONS as u64 {
        table = table.with(region(slot * 2 * PAGE, PAGE, 0), fd.try_clone().unwrap()).unwrap();
    }
    assert_eq!(table.memory().num_regions(), 512);
    assert_eq!(table.translate(0x7f00_0000_0000 + 511 * 2 * PAGE, PAGE), Some(GuestAddress(511 * 2 * PAGE)));
    assert_eq!(refusal(table.with(region(1 << 40, PAGE, 0), fd)), "more than 512 memory regions");
}
