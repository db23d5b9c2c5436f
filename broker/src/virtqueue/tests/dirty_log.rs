//! The log of written pages.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Barrier, Mutex};

use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::driver::{Driver, USED_RING};
use crate::virtqueue::crash::{visit_after, was_visited};
use crate::virtqueue::{DirtyLog, QueueSetup, SplitQueue};

const PAGE_BYTES: u64 = 4096;

fn file(size_bytes: u64) -> File {
    let fd = rustix::fs::memfd_create("log", MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, size_bytes).expect("memory");
    File::from(fd)
}

fn another(file: &File) -> OwnedFd {
    file.try_clone().expect("a file descriptor").into()
}

/// The marked pages in a log of `len_bytes` bytes, as the front-end reads it.
fn marked(file: &File, offset_bytes: u64, len_bytes: usize) -> Vec<u64> {
    let mut bits = vec![0; len_bytes];
    file.read_exact_at(&mut bits, offset_bytes).expect("the log");
    (0..8 * len_bytes as u64).filter(|page| bits[(page / 8) as usize] & 1 << (page % 8) != 0).collect()
}

#[test]
fn exactly_the_touched_pages_are_marked() {
    let file = file(PAGE_BYTES);
    let log = DirtyLog::from_fd(another(&file), 0, 64).expect("a log of 512 pages");
    log.mark(0, 0);
    assert!(marked(&file, 0, 64).is_empty());
    log.mark(5 * PAGE_BYTES + 4095, 1);
    assert_eq!(marked(&file, 0, 64), [5]);
    log.mark(7 * PAGE_BYTES + 4095, 2);
    assert_eq!(marked(&file, 0, 64), [5, 7, 8]);
    log.mark(14 * PAGE_BYTES, 20 * PAGE_BYTES);
    assert_eq!(marked(&file, 0, 64), [5, 7, 8].into_iter().chain(14..34).collect::<Vec<_>>());
    assert_eq!(log.out_of_range_pages(), 0);
}

#[test]
fn pages_beyond_the_log_are_counted_and_not_marked() {
    let file = file(2 * PAGE_BYTES);
    // 24 pages, in front of bytes that do not belong to the log.
    let log = DirtyLog::from_fd(another(&file), 0, 3).expect("a log of 24 pages");
    log.mark(22 * PAGE_BYTES, 5 * PAGE_BYTES);
    assert_eq!((marked(&file, 0, 8), log.out_of_range_pages()), (vec![22, 23], 3));
    log.mark(24 * PAGE_BYTES, 1);
    log.mark(u64::MAX, 1);
    log.mark(u64::MAX - 4096, u64::MAX);
    assert_eq!((marked(&file, 0, 8), log.out_of_range_pages()), (vec![22, 23], 3 + 1 + 1 + 2));
}

#[test]
fn a_log_may_begin_at_any_page_of_its_file() {
    let file = file(2 * PAGE_BYTES);
    let log = DirtyLog::from_fd(another(&file), PAGE_BYTES, 64).expect("a log");
    log.mark(0, 1);
    assert_eq!((marked(&file, 0, 4096), marked(&file, PAGE_BYTES, 64)), (vec![], vec![0]));
}

#[test]
fn bad_logs_are_refused() {
    let file = file(2 * PAGE_BYTES);
    let refusal = |offset_bytes, size_bytes| {
        DirtyLog::from_fd(another(&file), offset_bytes, size_bytes).expect_err("a bad log").to_string()
    };
    assert_eq!(refusal(0, 0), "a shared area of 0 bytes: it must not be empty");
    assert_eq!(
        refusal(64, 64),
        "a shared area at offset 64 of its file: the offset must be a multiple of the page size 4096"
    );
    let outside = |what: &str| format!("a shared area of {what}: it must end inside the file");
    assert_eq!(refusal(4096, 4097), outside("4097 bytes at offset 4096 of a file of 8192 bytes"));
    let expected = outside("4096 bytes at offset 18446744073709547520 of a file of 8192 bytes");
    assert_eq!(refusal(u64::MAX - 4095, 4096), expected);
    let pipe = rustix::pipe::pipe().expect("a pipe").0;
    let refusal = DirtyLog::from_fd(pipe, 0, 1).expect_err("not a file").to_string();
    assert_eq!(refusal, outside("1 bytes at offset 0 of a file of 0 bytes"));
}

#[test]
fn no_mark_of_several_threads_is_lost() {
    // So many that two threads almost certainly lose a mark at the same byte if marking is not atomic.
    const LOG_BYTES: u64 = 1 << 19;
    let file = file(LOG_BYTES);
    let log = DirtyLog::from_fd(another(&file), 0, LOG_BYTES).expect("a log");
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (log, start) = (&log, &start);
            scope.spawn(move || {
                start.wait();
                // All threads write each byte of the log.
                for page in (thread..8 * LOG_BYTES).step_by(4) {
                    log.mark(page * PAGE_BYTES, 1);
                }
            });
        }
    });
    assert_eq!(marked(&file, 0, LOG_BYTES as usize).len() as u64, 8 * LOG_BYTES);
}

fn used_ring(memory: &GuestMemoryMmap, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; 6 + 8 * size];
    memory.read_slice(&mut bytes, GuestAddress(USED_RING)).expect("inside");
    bytes
}

/// The pages of the log in which the used ring changed, for a used ring at this address of the log.
fn changed_pages(before: &[u8], after: &[u8], used_log_gpa: u64) -> Vec<u64> {
    let changed = (0..before.len()).filter(|&offset| before[offset] != after[offset]);
    let mut pages: Vec<u64> = changed.map(|offset| (used_log_gpa + offset as u64) / PAGE_BYTES).collect();
    pages.dedup();
    pages
}

proptest! {
    /// 1024 entries: a used ring of more than two pages, at any offset in a page of the log.
    #[test]
    fn every_changed_byte_of_the_used_ring_is_logged(
        used_log_gpa in 0..64 * PAGE_BYTES,
        event_idx: bool,
        start: u16,
        rounds in 1..20_u16,
    ) {
        let file = file(PAGE_BYTES);
        let log = DirtyLog::from_fd(another(&file), 0, 4096).expect("a log");
        let mut driver = Driver::at_index(1024, start);
        let driver_features = u64::from(event_idx) << VIRTIO_RING_F_EVENT_IDX;
        let setup = QueueSetup { driver_features, used_log_gpa: Some(used_log_gpa), ..driver.setup() };
        let mut queue = SplitQueue::new(setup, &driver.memory).expect("a good set-up");
        let before = used_ring(&driver.memory, 1024);
        for head in 0..rounds {
            driver.submit(head, 0);
            queue.pop_recorded(&driver.memory).expect("honest").expect("one");
            queue.complete(head, 0x0101_0101, Some(&log)).expect("in flight");
            queue.enable_kicks(Some(&log));
            queue.disable_kicks(Some(&log));
        }
        let marks = marked(&file, 0, 4096);
        for page in changed_pages(&before, &used_ring(&driver.memory, 1024), used_log_gpa) {
            prop_assert!(marks.contains(&page), "page {page} changed, marked are {marks:?}");
        }
        // Only with EVENT_IDX a field follows the entries.
        let len_bytes = before.len() as u64 - if event_idx { 0 } else { 2 };
        let ring_pages = used_log_gpa / PAGE_BYTES..=(used_log_gpa + len_bytes - 1) / PAGE_BYTES;
        prop_assert!(marks.iter().all(|page| ring_pages.contains(page)), "{marks:?} outside {ring_pages:?}");
        queue.mark_used_ring(&log);
        prop_assert_eq!(marked(&file, 0, 4096), ring_pages.collect::<Vec<_>>());
    }
}

/// A front-end clears the log and copies the marked pages, again and again, while the device runs.
#[test]
fn a_front_end_that_copies_between_any_two_stores_misses_no_write() {
    for driver_features in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        for stores in 0.. {
            let file = file(PAGE_BYTES);
            let log = DirtyLog::from_fd(another(&file), 0, 64).expect("a log");
            let mut driver = Driver::new(8);
            let setup = QueueSetup { driver_features, used_log_gpa: Some(USED_RING), ..driver.setup() };
            let mut queue = SplitQueue::new(setup, &driver.memory).expect("a good set-up");
            driver.submit(3, 0);
            queue.pop_recorded(&driver.memory).expect("honest").expect("one");

            let copy = Arc::new(Mutex::new(used_ring(&driver.memory, 8)));
            let (memory, log_file, copied) = (driver.memory.clone(), another(&file), Arc::clone(&copy));
            visit_after(stores, move || {
                File::from(log_file).write_all_at(&[0; 64], 0).expect("the log");
                *copied.lock().expect("no panic") = used_ring(&memory, 8);
            });
            queue.disable_kicks(Some(&log));
            queue.complete(3, 77, Some(&log)).expect("in flight");
            queue.enable_kicks(Some(&log));
            if !was_visited() {
                assert!(stores > 6, "there are more than 6 stores");
                break;
            }
            let is_complete = *copy.lock().expect("no panic") == used_ring(&driver.memory, 8);
            assert!(
                is_complete || marked(&file, 0, 64) == [USED_RING / PAGE_BYTES],
                "after store {stores} the copy is out of date and no mark says so"
            );
        }
    }
}

#[test]
fn nothing_is_logged_without_a_log_address() {
    let file = file(PAGE_BYTES);
    let log = DirtyLog::from_fd(another(&file), 0, 4096).expect("a log");
    let mut driver = Driver::new(8);
    let mut queue = SplitQueue::new(driver.setup(), &driver.memory).expect("a good set-up");
    for head in 0..2 {
        driver.submit(head, 0);
        queue.pop_recorded(&driver.memory).expect("honest").expect("one");
        queue.complete(head, 0, Some(&log)).expect("in flight");
        queue.enable_kicks(Some(&log));
        if head == 0 {
            assert!(marked(&file, 0, 4096).is_empty());
            queue.set_used_log_gpa(Some(0x3000));
        }
    }
    assert_eq!(marked(&file, 0, 4096), [3]);
}
