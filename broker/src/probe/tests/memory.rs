//! Reports on memory: what may be pinned, and reserved huge pages.

use nix::libc::ENOMEM;

use super::super::*;
use super::{MIB, assert_no_direct, fails, good};
use crate::limits::{Memlock, PinnedBy};

#[test]
fn little_lockable_memory_is_explained_with_its_holders() {
    let mut facts = good();
    facts.memlock.pinned_by = vec![PinnedBy { pid: 7, comm: "qemu".into(), pinned_bytes: 8 * MIB - 4096 }];
    let report = Report::judge(&facts);
    let check = report.check("memlock").unwrap();
    assert_eq!(
        check.detail,
        "4 KiB left of 8 MiB (RLIMIT_MEMLOCK), for all of a guest's RAM, about 1 MiB for its rings and 24 KiB for the \
         rings of the workers; pinned by this user: qemu[7] 8188 KiB"
    );
    let why = check.why.as_deref().unwrap();
    assert!(why.starts_with("not even a guest with 1 MiB of RAM can be pinned: pinning needs 2072 KiB"), "{why}");
    assert!(why.contains("qemu[7]"), "{why}");
    assert_eq!(check.change, ["raise RLIMIT_MEMLOCK to the guest's RAM and 2 MiB, or give the broker CAP_IPC_LOCK"]);
    assert!(!report.mode(ModeName::DirectGuestRam).unwrap().available);
    assert!(report.mode(ModeName::Virtqueue).unwrap().available, "it pins nothing");
}

#[test]
fn memory_without_a_limit_gets_no_note() {
    for (memlock, detail) in [
        (Memlock { soft_bytes: None, ..good().memlock }, "unlimited (RLIMIT_MEMLOCK)"),
        (Memlock { exempt: true, ..good().memlock }, "unlimited for this process (CAP_IPC_LOCK)"),
    ] {
        let report = Report::judge(&Facts { memlock, ..good() });
        assert_eq!(report.check("memlock").unwrap().detail, detail);
        assert!(report.mode(ModeName::DirectGuestRam).unwrap().notes.is_empty());
    }
}

#[test]
fn pinning_that_fails_for_lack_of_memory_points_to_the_limit() {
    let mut facts = good();
    fails(&mut facts, Feature::PinnedMemory, ENOMEM);
    assert_no_direct(
        &facts,
        "pinning memory as a fixed buffer: io_uring_setup: Cannot allocate memory (os error 12); without it, guest \
         memory cannot be used for I/O without the broker",
        &["raise RLIMIT_MEMLOCK (see the line on memory that may be pinned), or the memory control group's limit"],
    );
}

#[test]
fn reserved_huge_pages_are_counted() {
    let huge_pages = vec![
        HugePagePool { page_bytes: 2 * MIB, total: 512, free: 12 },
        HugePagePool { page_bytes: 1024 * MIB, total: 0, free: 0 },
    ];
    let report = Report::judge(&Facts { huge_pages: Some(huge_pages), ..good() });
    let check = report.check("huge-pages").unwrap();
    assert_eq!(check.detail, "2 MiB: 12 free of 512; 1 GiB: 0 free of 0");
    assert_eq!(check.status, Status::Information);
    let none = Report::judge(&good());
    assert!(none.check("huge-pages").unwrap().detail.starts_with("none reserved (2 MiB); "));
}
