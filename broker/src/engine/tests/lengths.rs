//! The length in the used ring: bytes that the device has certainly written, from the first on (VIRTIO 1.2, 2.7.8.2).

use ringpass_guest_abi::probe::ProbeAnswer;
use ringpass_guest_abi::request::{EventAnswer, Outcome, T_ARM, T_EVENT, T_PROBE};

use super::attach::{queue_zero, rig};
use super::block_driver::Outcome as BlkOutcome;
use super::rig::{DISK_BYTES, Options, Rig, SECTOR, contents};
use super::ring_driver::QueueZero;
use crate::disk::DirectIo;
use crate::vhost_user::Device;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[track_caller]
fn ensure(outcome: &BlkOutcome, status: u8, used_bytes: u32) {
    assert_eq!((outcome.status, outcome.used_bytes), (status, used_bytes));
}

/// Sends a request, and waits for the next one that ends. Gives the length of that one in the used ring.
fn used_bytes(queue: &mut QueueZero, kind: u32, payload: &[u8]) -> u32 {
    queue.send(kind, payload).unwrap();
    queue.next_used().unwrap().len_bytes
}

#[test]
fn a_read_that_fails_part_way_has_written_what_came_before() {
    for (direct_io, misalignment_bytes) in [(DirectIo::Off, 0), (DirectIo::On, 0), (DirectIo::On, 3)] {
        let mut rig = Rig::new(Options { direct_io, ..Options::default() });
        let mut driver = rig.running(0);
        driver.misalignment_bytes = misalignment_bytes;
        rig.image.as_file().set_len(DISK_BYTES / 2).unwrap();
        let end = DISK_BYTES / 2 / SECTOR;
        ensure(&driver.read(end, 8), IOERR, 0);
        let across = driver.read(end - 8, 16);
        ensure(&across, IOERR, 8 * 512);
        assert_eq!(across.data[..8 * 512], contents(0, end - 8, 8));
        ensure(&driver.read(end - 8, 8), OK, 8 * 512 + 1);
    }
}

#[test]
fn requests_without_room_for_data_have_written_their_status() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    ensure(&driver.write_data(0, &[1; 512]), OK, 1);
    ensure(&driver.flush(), OK, 1);
    ensure(&driver.discard(0, 8), OK, 1);
    ensure(&driver.write_zeroes(0, 8, true), OK, 1);
    ensure(&driver.write_data(DISK_BYTES / SECTOR, &[1; 512]), IOERR, 1);
    ensure(&driver.nonsense(), UNSUPP, 1);
}

#[test]
fn a_refused_read_has_written_nothing_before_its_status() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    ensure(&driver.read(DISK_BYTES / SECTOR, 1), IOERR, 0);
}

#[test]
fn the_id_is_twenty_bytes_in_any_buffer_that_has_room_for_it() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    for (room_bytes, status, used_bytes) in [(20, OK, 21), (21, OK, 20), (512, OK, 20), (19, IOERR, 0)] {
        for segment_bytes in [u32::MAX, 7] {
            driver.segment_bytes = segment_bytes;
            ensure(&driver.id_in(room_bytes), status, used_bytes);
        }
    }
}

#[test]
fn an_attach_request_has_written_its_answer() {
    // The buffer for an answer has 256 bytes, all of them before the status.
    let mut rig = rig(2, 1);
    let mut queue = queue_zero(&mut rig);
    assert_eq!(used_bytes(&mut queue, T_PROBE, &[]), ProbeAnswer::BYTES as u32);
    assert_eq!(used_bytes(&mut queue, T_ARM, &[]), Outcome::BYTES as u32, "a refusal has its outcome");
    queue.post_event().unwrap();
    // A second one brings the first one back.
    assert_eq!(used_bytes(&mut queue, T_EVENT, &[]), EventAnswer::BYTES as u32);

    let mut without_rings = Rig::new(Options::default());
    let mut queue = queue_zero(&mut without_rings);
    assert_eq!(used_bytes(&mut queue, T_PROBE, &[]), 0, "an unknown type writes its status only");
    without_rings.engine.stop_queue(0);
}
