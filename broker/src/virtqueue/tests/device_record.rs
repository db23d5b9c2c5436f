//! The device record behind the queues of an in-flight region.

use std::os::fd::AsRawFd;

use super::inflight::{RECORD_AREA_BYTES, memfd};
use crate::virtqueue::crash::live_for;
use crate::virtqueue::{DEVICE_RECORD_MAX_BYTES, InflightRegion};

/// A region that ringpass made for two queues of 8. Each call maps it again.
fn region_with_record() -> impl Fn() -> InflightRegion {
    let file = InflightRegion::create(2, 8).expect("a memfd");
    move || {
        let fd = file.fd.try_clone().expect("a file descriptor");
        InflightRegion::from_fd(fd, 0, file.size_bytes, 2, 8).expect("our own region")
    }
}

#[test]
fn the_next_process_finds_the_device_record() {
    let map = region_with_record();
    let region = map();
    assert_eq!(region.device_record(), None, "no process has recorded anything");
    let last = region.queue(1).expect("two queues");
    for head in 0..8 {
        last.set_counter(head, u64::MAX);
    }
    for record in [&b"one"[..], b"", b"the third, which is longer", &[0xff; DEVICE_RECORD_MAX_BYTES]] {
        region.set_device_record(record);
        assert_eq!(map().device_record().as_deref(), Some(record));
    }
    region.set_device_record(&[1; DEVICE_RECORD_MAX_BYTES + 1]);
    assert_eq!(map().device_record(), Some(vec![0xff; DEVICE_RECORD_MAX_BYTES]), "the longer record does not fit");
    assert!((0..8).all(|head| last.counter(head) == u64::MAX));
}

#[test]
fn a_region_of_another_back_end_has_no_record_and_gets_none() {
    // As large as a region of ringpass, larger, and as small as possible.
    for size_bytes in [2 * 192, 2 * 192 + RECORD_AREA_BYTES, 1 << 16] {
        let fd = memfd(size_bytes);
        let region = InflightRegion::from_fd(fd.try_clone().unwrap(), 0, size_bytes, 2, 8).expect("a good region");
        region.set_device_record(b"record");
        assert_eq!(region.device_record(), None);
        let bytes = std::fs::read(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("the region");
        assert!(bytes.iter().all(|byte| *byte == 0), "nothing is written behind the queues of another back-end");
    }
    // A size that was rounded up, while its file was not.
    assert!(InflightRegion::from_fd(memfd(2 * 192), 0, 4096, 2, 8).is_ok());
}

#[test]
fn a_process_that_dies_while_it_records_leaves_a_whole_record() {
    for stores in 0.. {
        let map = region_with_record();
        for record in [b"first", b"other"] {
            map().set_device_record(record);
        }
        let lived = live_for(stores, || map().set_device_record(b"third")).is_some();
        let found = map().device_record().expect("a whole record");
        assert!(found == b"other" || lived && found == b"third", "{found:?} after {stores} stores");
        // The next process can record again.
        map().set_device_record(b"after");
        assert_eq!(map().device_record().as_deref(), Some(&b"after"[..]));
        if lived {
            assert!(stores > 10, "a record takes more than 10 stores");
            return;
        }
    }
}

#[test]
fn a_partly_written_first_record_is_ignored() {
    for stores in 0.. {
        let map = region_with_record();
        let lived = live_for(stores, || map().set_device_record(b"first")).is_some();
        assert_eq!(map().device_record().is_some(), lived, "after {stores} stores");
        if lived {
            return;
        }
    }
}
