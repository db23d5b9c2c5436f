//! Every refusal, by its message; and the limits of pinning.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::MemfdFlags;

use super::*;

const MIB: u64 = 1 << 20;

fn memfd(len_bytes: u64) -> Arc<File> {
    let fd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len_bytes).unwrap();
    Arc::new(File::from(fd))
}

fn region(gpa: u64, len_bytes: u64) -> RegionConfig {
    RegionConfig { gpa, len_bytes, file: memfd(len_bytes), file_offset_bytes: 0 }
}

fn refusal(regions: impl IntoIterator<Item = RegionConfig>) -> String {
    GuestMemory::new(regions).unwrap_err().to_string()
}

#[test]
fn no_regions_and_empty_regions_are_refused() {
    assert_eq!(refusal([]), "the guest has no memory regions");
    assert_eq!(
        refusal([RegionConfig { len_bytes: 0, ..region(MIB, MIB) }]),
        "the memory region at guest-physical 0x100000 has no bytes"
    );
}

#[test]
fn an_unaligned_region_is_refused_by_the_name_of_the_unaligned_value() {
    let cases = [
        (RegionConfig { gpa: 100, ..region(0, MIB) }, "address 0x64"),
        (RegionConfig { len_bytes: 5000, ..region(0, MIB) }, "length 0x1388"),
        (RegionConfig { file_offset_bytes: 512, ..region(0, MIB) }, "file offset 0x200"),
    ];
    for (config, what) in cases {
        let gpa = config.gpa;
        assert_eq!(
            refusal([config]),
            format!(
                "the memory region at guest-physical {gpa:#x} has {what}, which is not a multiple of the 4096-byte \
                 pages of its file (/memfd:guest-ram (deleted))"
            )
        );
    }
}

#[test]
fn a_region_above_16_tib_is_refused() {
    let config = RegionConfig { gpa: (16 << 40) - MIB, len_bytes: 2 * MIB, ..region(0, 2 * MIB) };
    assert!(refusal([config]).contains("ends above 16 TiB"));
    let wrapping = RegionConfig { gpa: u64::MAX - 4095, len_bytes: 8192, ..region(0, MIB) };
    assert!(refusal([wrapping]).contains("ends above 16 TiB"));
}

#[test]
fn overlapping_regions_are_refused_with_both_addresses() {
    assert_eq!(
        refusal([region(MIB, 2 * MIB), region(0, MIB + 4096)]),
        "the memory region at guest-physical 0x100000 with 0x200000 bytes overlaps the one at 0x0 with 0x101000 bytes"
    );
    GuestMemory::new([region(MIB, MIB), region(0, MIB)]).expect("regions that touch do not overlap");
}

#[test]
fn a_region_longer_than_its_file_is_refused() {
    let config = RegionConfig { file_offset_bytes: 4096, ..region(0, MIB) };
    assert_eq!(
        refusal([config]),
        "the memory region at guest-physical 0x0 needs its file (/memfd:guest-ram (deleted)) to have 1052672 bytes, it \
         has 1048576"
    );
}

#[test]
fn memory_on_a_disk_file_system_is_refused_by_the_name_of_the_file_system() {
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.set_len(MIB).unwrap();
    let refused = refusal([RegionConfig { file: Arc::new(file), ..region(0, MIB) }]);
    assert!(refused.contains("only memfd, tmpfs and hugetlbfs memory can be used for direct mode"), "{refused}");
    let statfs = rustix::fs::statfs(env!("CARGO_MANIFEST_DIR")).unwrap();
    if statfs.f_type == 0xef53 {
        assert!(refused.contains("(deleted) on ext4:"), "{refused}");
    }
}

#[test]
fn read_only_memory_is_refused() {
    let writable = memfd(MIB);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*writable));
    let file = Arc::new(File::open(path).unwrap());
    let refused = refusal([RegionConfig { file, ..region(0, MIB) }]);
    assert!(refused.contains("cannot be written through its file (/memfd:guest-ram (deleted)): pass it read-write"));
}

#[test]
fn a_range_that_leaves_its_region_is_outside_ram() {
    let memory = GuestMemory::new([region(0, MIB), region(MIB, MIB), region(4 * MIB, MIB)]).unwrap();
    memory.host_address(0, MIB).unwrap();
    for (gpa, len_bytes) in [(0, MIB + 1), (MIB - 4096, 8192), (3 * MIB, 1), (5 * MIB, 1), (u64::MAX, 2)] {
        let error = memory.host_address(gpa, len_bytes).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "the {len_bytes:#x} bytes at guest-physical {gpa:#x} do not lie inside one memory region of the guest"
            )
        );
    }
}

#[test]
fn the_addresses_are_free_after_pinning_so_that_guests_share_them() {
    let first = GuestMemory::new([region(0, MIB)]).unwrap();
    let second = GuestMemory::new([region(0, MIB)]).unwrap();
    let _first = PinnedMemory::pin(&first, Sharing::Clone).unwrap();
    let _second = PinnedMemory::pin(&second, Sharing::Clone).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("200000000000-"), "nothing is left mapped at the IOVA:\n{maps}");
}

#[test]
fn plugging_pins_only_the_slots_that_change() {
    let memory = GuestMemory::new([region(0, MIB), region(5 << 30, MIB)]).unwrap();
    let pinned = PinnedMemory::pin(&memory, Sharing::Clone).unwrap();
    let grown = memory.with_region(region(7 << 30, 2 * MIB)).unwrap();
    let (_, slots) = pinned.changed_to(&grown).unwrap();
    assert_eq!(slots, ChangedSlots { first: 7 << 8, count: 1 });
    let grown = memory.with_region(region(3 * MIB, MIB)).unwrap();
    let (_, slots) = pinned.changed_to(&grown).unwrap();
    assert_eq!(slots, ChangedSlots { first: 0, count: 1 }, "the hole in between is filled");
    let grown = memory.with_region(region((9 << 30) - MIB, 2 * MIB)).unwrap();
    let (_, slots) = pinned.changed_to(&grown).unwrap();
    assert_eq!(slots, ChangedSlots { first: (9 << 8) - 1, count: 2 });
    // The span is exchanged as a whole.
    let other = memory.with_regions([region(0, MIB), region((5 << 30) + 100 * MIB, MIB)]).unwrap();
    let (_, slots) = pinned.changed_to(&other).unwrap();
    assert_eq!(slots, ChangedSlots { first: 0, count: (5 << 8) + 26 });
}

#[test]
fn pinning_is_cancelled_within_a_slot_and_leaves_the_memory_that_was_pinned() {
    let large = GuestMemory::new([region(0, MIB), region(4 << 30, 100 * MIB)]).unwrap();
    let small = GuestMemory::new([region(0, MIB)]).unwrap();
    let pinned_bytes = || crate::limits::Memlock::pinned_by_this_process().unwrap();
    type Pinning<'a> = &'a dyn Fn(&dyn Fn() -> bool) -> Result<(), MemoryError>;
    let given_up = |pin: Pinning<'_>, questions: u32| {
        let before = pinned_bytes();
        let asked = std::cell::Cell::new(0);
        let error = pin(&|| asked.replace(asked.get() + 1) < questions - 1).unwrap_err();
        assert!(matches!(error, MemoryError::NotWanted), "{error}");
        assert_eq!((asked.get(), pinned_bytes()), (questions, before));
    };
    given_up(&|is_wanted| PinnedMemory::pin_while(&large, Sharing::Clone, is_wanted).map(drop), 3);
    let pinned = PinnedMemory::pin(&small, Sharing::Clone).unwrap();
    given_up(&|is_wanted| pinned.changed_to_while(&large, is_wanted).map(drop), 2);
    pinned.changed_to(&large).unwrap();
}

#[test]
fn without_cloning_memory_cannot_be_plugged_and_the_error_gives_the_reason() {
    let memory = GuestMemory::new([region(0, MIB)]).unwrap();
    let pinned = PinnedMemory::pin(&memory, Sharing::PinAgain).unwrap();
    let grown = memory.with_region(region(MIB, MIB)).unwrap();
    let error = pinned.changed_to(&grown).unwrap_err().to_string();
    assert!(error.contains("IORING_REGISTER_DST_REPLACE (Linux 6.13)"), "{error}");
}

#[test]
fn memory_above_the_last_slot_is_refused_unless_there_is_room_for_it() {
    let small = || region(0, MIB);
    let far = || region((64 << 30) - MIB, 2 * MIB);
    let error = GuestMemory::new([small()]).unwrap().with_region(far()).unwrap_err().to_string();
    let expected = "ends above 64 GiB, the most that 16384 registered buffers of 4 MiB can cover";
    assert!(error.contains(expected), "{error}");
    // Memory that is there from the beginning, or has room, decides the size of the slots.
    for memory in [GuestMemory::new([small(), far()]), GuestMemory::with_room_up_to([small()], (64 << 30) + 1)] {
        let memory = memory.unwrap();
        assert_eq!(memory.addressing().slot_shift(), 23);
        assert_eq!(memory.with_regions([small(), far()]).unwrap().addressing(), memory.addressing());
    }
    let most = GuestMemory::with_room_up_to([small()], u64::MAX).unwrap();
    assert_eq!(most.addressing().slot_bytes(), 1 << 30);
}
