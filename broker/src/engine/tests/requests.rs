//! What requests do, at all depths and on all kinds of rings.

use std::collections::HashMap;
use std::time::Duration;

use super::block_driver::BlockDriver;
use super::rig::{DISK_BYTES, Options, Rig, SECTOR, SPARE_GPA, content, contents};
use crate::disk::DirectIo;
use crate::vhost_user::Device;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[test]
fn a_read_returns_what_is_on_the_disk() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    let outcome = driver.read(40, 8);
    assert_eq!(outcome.status, OK);
    assert_eq!(outcome.data, contents(0, 40, 8));
    assert_eq!(outcome.used_bytes, 8 * 512 + 1);
}

#[test]
fn a_write_and_a_flush_put_data_on_the_disk() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    let outcome = driver.write_data(8, &contents(1, 8, 24));
    assert_eq!((outcome.status, outcome.used_bytes), (OK, 1));
    assert_eq!(driver.flush().status, OK);
    assert_eq!(rig.on_disk(0, 40 * SECTOR), [contents(0, 0, 8), contents(1, 8, 24), contents(0, 32, 8)].concat());
}

#[test]
fn get_id_returns_the_serial_number() {
    let mut rig = Rig::new(Options::default());
    let outcome = rig.running(0).id();
    assert_eq!(outcome.status, OK);
    assert_eq!(outcome.data, b"engine-test\0\0\0\0\0\0\0\0\0");
}

#[test]
fn discards_and_write_zeroes_leave_zeroes_and_nothing_else_changes() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    assert_eq!(driver.discard(8, 16).status, OK);
    assert_eq!(driver.write_zeroes(32, 16, true).status, OK);
    assert_eq!(driver.write_zeroes(64, 8, false).status, OK);
    let zeroes = |sectors: usize| vec![0; sectors * 512];
    let expected = [
        contents(0, 0, 8),
        zeroes(16),
        contents(0, 24, 8),
        zeroes(16),
        contents(0, 48, 16),
        zeroes(8),
        contents(0, 72, 8),
    ];
    assert_eq!(rig.on_disk(0, 80 * SECTOR), expected.concat());
    assert_eq!(driver.read(8, 16).data, zeroes(16));
}

#[test]
fn refused_requests_are_answered_and_the_queue_goes_on() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    assert_eq!(driver.read(DISK_BYTES / SECTOR - 1, 2).status, IOERR);
    assert_eq!(driver.nonsense().status, UNSUPP);
    assert_eq!(driver.read(0, 1).data, content(0, 0));
    assert_eq!(rig.engine.control().counters()[0].refused.get(), 2);
}

#[test]
fn a_read_only_disk_is_read_and_not_written() {
    let mut rig = Rig::new(Options { read_only: true, ..Options::default() });
    let mut driver = rig.running(0);
    assert_eq!(driver.write_data(0, &[7; 512]).status, IOERR);
    assert_eq!(driver.read(0, 1).data, content(0, 0));
    assert_eq!(driver.flush().status, OK);
}

#[test]
fn a_read_beyond_the_end_of_a_disk_that_shrank_fails() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    rig.image.as_file().set_len(DISK_BYTES / 2).unwrap();
    let half = DISK_BYTES / 2 / SECTOR;
    assert_eq!(driver.read(half, 8).status, IOERR, "beyond the end");
    assert_eq!(driver.read(half - 4, 8).status, IOERR, "across the end");
    assert_eq!(driver.read(half - 8, 8).status, OK, "before the end");
    assert_eq!(rig.engine.control().counters()[0].failed.get(), 2);
}

/// A driver that keeps `depth` random reads and writes outstanding and knows what must come back.
///
/// `sectors` are its own.
fn verify_at_depth(driver: &mut BlockDriver, depth: usize, requests: u32, sectors: std::ops::Range<u64>, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut generations: HashMap<u64, u64> = HashMap::new();
    // By head: first sector, number of sectors, and the generation that is written.
    let mut outstanding: HashMap<u16, (u64, u64, Option<u64>)> = HashMap::new();
    let (mut sent, mut ended) = (0, 0);
    while ended < requests {
        while sent < requests && outstanding.len() < depth && driver.has_room(8 * 512) {
            // None is a flush.
            let count = if rng.u8(..) < 12 { 0 } else { 1 + rng.u64(0..8) };
            let first = rng.u64(sectors.start..sectors.end - count);
            let overlaps = |&(other, len, _): &(u64, u64, _)| first < other + len && other < first + count;
            if outstanding.values().any(overlaps) {
                // Requests that overlap have no order.
                break;
            }
            let generation = rng.bool().then_some(u64::from(sent) + 1);
            let head = match generation {
                _ if count == 0 => driver.add_flush(),
                Some(generation) => driver.add_write(first, &contents(generation, first, count)),
                None => driver.add_read(first, count),
            };
            outstanding.insert(head, (first, count, generation));
            sent += 1;
        }
        let outcome = driver.wait();
        let (first, count, generation) = outstanding.remove(&outcome.head).expect("an outstanding request");
        assert_eq!(outcome.status, OK, "sectors {first}+{count}");
        match generation {
            Some(generation) => generations.extend((first..first + count).map(|sector| (sector, generation))),
            None => {
                for (number, bytes) in outcome.data.chunks(512).enumerate() {
                    let sector = first + number as u64;
                    let generation = generations.get(&sector).copied().unwrap_or(0);
                    assert_eq!(bytes, content(generation, sector), "sector {sector}, generation {generation}");
                }
            }
        }
        ended += 1;
    }
}

#[test]
fn every_depth_every_kind_of_ring_and_every_way_to_wait_returns_the_right_data() {
    for poll_us in [0, 50] {
        let options = Options { poll_time: Duration::from_micros(poll_us), ..Options::default() };
        let mut rig = Rig::new(options);
        for (round, depth) in [1, 2, 7, 32, 128].into_iter().enumerate() {
            for kind in 0..8 {
                let mut driver = rig.driver(0);
                driver.vring.set_event_idx(kind & 1 != 0);
                driver.indirect = kind & 2 != 0;
                driver.by_interrupt = kind & 4 != 0;
                driver.segment_bytes = [u32::MAX, 512, 1000][round % 3];
                rig.start(&driver);
                let first = (kind + 8 * round as u64) * 400;
                verify_at_depth(&mut driver, depth, 300, first..first + 400, kind);
                assert_eq!(rig.engine.stop_queue(0), Some(300), "the available index at the stop");
            }
        }
    }
}

#[test]
fn four_queues_on_two_workers_do_not_mix_their_data_up() {
    let options = Options { queues: 4, workers: 2, ..Options::default() };
    let mut rig = Rig::new(options);
    let drivers: Vec<_> = (0..4).map(|index| rig.running(index)).collect();
    std::thread::scope(|scope| {
        for mut driver in drivers {
            scope.spawn(move || {
                driver.by_interrupt = driver.index % 2 == 0;
                let number = u64::from(driver.index);
                verify_at_depth(&mut driver, 16, 3000, number * 8000..(number + 1) * 8000, number);
            });
        }
    });
}

#[test]
fn buffers_that_direct_io_does_not_take_are_bounced() {
    for (misalignment_bytes, segment_bytes) in [(1, u32::MAX), (3, 512), (511, 700)] {
        let mut rig = Rig::new(Options { direct_io: DirectIo::On, ..Options::default() });
        let mut driver = rig.running(0);
        driver.misalignment_bytes = misalignment_bytes;
        driver.segment_bytes = segment_bytes;
        // More than there are bounce buffers, so that some wait.
        verify_at_depth(&mut driver, 24, 200, 0..2000, misalignment_bytes);
        let bounced = rig.engine.control().counters()[0].bounced.get();
        assert!(bounced >= 100, "{bounced} of 200");
    }
}

#[test]
fn requests_longer_than_a_bounce_buffer_go_through_it_in_pieces() {
    let mut rig = Rig::new(Options { direct_io: DirectIo::On, ..Options::default() });
    let mut driver = rig.running(0);
    driver.data_gpa = Some(SPARE_GPA);
    driver.misalignment_bytes = 5;
    driver.segment_bytes = 99_999;
    let data = contents(1, 16, 2000);
    assert_eq!(driver.write_data(16, &data).status, OK);
    assert_eq!(rig.on_disk(0, 3000 * SECTOR), [contents(0, 0, 16), data.clone(), contents(0, 2016, 984)].concat());
    driver.misalignment_bytes = 77;
    assert_eq!(driver.read(16, 2000).data, data);
    assert_eq!(rig.engine.control().counters()[0].bounced.get(), 2);
}

#[test]
fn aligned_buffers_are_not_bounced() {
    let mut rig = Rig::new(Options { direct_io: DirectIo::On, ..Options::default() });
    let mut driver = rig.running(0);
    driver.segment_bytes = 4096;
    verify_at_depth(&mut driver, 8, 100, 0..2000, 1);
    assert_eq!(rig.engine.control().counters()[0].bounced.get(), 0);
}

#[test]
fn a_ring_may_be_larger_than_the_device_expects() {
    let mut rig = Rig::new(Options { queue_size: 64, ..Options::default() });
    assert_eq!(rig.engine.max_queue_size(), 32768, "what VIRTIO allows");
    rig.options.queue_size = 256;
    let mut driver = rig.running(0);
    for generation in 0..8 {
        let mut sectors = HashMap::new();
        while driver.has_room(4096) {
            let sector = 8 * (generation + sectors.len() as u64);
            sectors.insert(driver.add_read(sector, 8), sector);
        }
        assert!(sectors.len() > 64);
        while driver.depth() > 0 {
            let outcome = driver.wait();
            assert_eq!(outcome.status, 0);
            assert_eq!(outcome.data, contents(0, sectors[&outcome.head], 8));
        }
    }
}
