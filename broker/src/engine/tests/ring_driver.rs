//! The driver that gets rings, of `ringpass-test-utils`, on an engine.

use ringpass_guest_abi::attach::AreaAddress;
use ringpass_test_utils::attach::{Attachment, Buffers, CQ_ENTRIES, Found, RequestPlaces};
use ringpass_test_utils::ram::Arena;
use ringpass_test_utils::vring::DriverVring;
use vm_memory::{Bytes, GuestAddress};

pub(super) use ringpass_test_utils::attach::{QueueZero, RingDriver, whole};

use super::driver::PATIENCE;

/// Where a queue's control page, areas and requests begin: in the second region, behind all that the rig uses.
const ATTACH_GPA: u64 = 25 << 20;
const ATTACH_BYTES: u64 = 1 << 20;
/// The areas have room for longer rings than the driver's.
const AREA_BYTES: u64 = 0x1_0000;
const SQES_OFFSET: u64 = 0x8000;
const REQUESTS_OFFSET: u64 = 0x8_0000;
const REQUESTS_BYTES: u64 = 0x4_0000;
/// Data for requests of the ring.
const DATA_OFFSET: u64 = 0xc_0000;

fn base_gpa(index: u16) -> u64 {
    ATTACH_GPA + u64::from(index) * ATTACH_BYTES
}

fn requests(index: u16) -> Arena {
    Arena::new(base_gpa(index) + REQUESTS_OFFSET, REQUESTS_BYTES)
}

/// The driver of queue 0.
pub(super) fn queue_zero_driver(vring: DriverVring) -> QueueZero {
    QueueZero::new(vring, &mut requests(0)).unwrap()
}

/// The driver of a queue that is to be attached.
pub(super) fn ring_queue_driver(vring: DriverVring, index: u16) -> RingDriver {
    let base = base_gpa(index);
    let area = |number: u64| {
        let rings_gpa = base + (number + 1) * AREA_BYTES;
        AreaAddress { rings_gpa: rings_gpa.into(), sqes_gpa: (rings_gpa + SQES_OFFSET).into() }
    };
    let memory = Attachment {
        requests: RequestPlaces::take(&mut requests(index), Attachment::PLACES).unwrap(),
        payload: Attachment::payload_of(base, [area(0), area(1)]),
        buffers: Buffers { gpa: base + DATA_OFFSET, count: CQ_ENTRIES.into(), each_bytes: 4096 },
    };
    RingDriver::with_memory(vring, memory)
}

/// The number of the queue that a driver drives.
pub(super) fn index_of(driver: &RingDriver) -> u64 {
    (driver.payload().control_gpa.get() - ATTACH_GPA) / ATTACH_BYTES
}

/// Sends ATTACH behind an ARM that has ended, and waits for the outcome.
pub(super) fn refused(driver: &mut RingDriver, payload: &[u8]) -> Found {
    driver.send_arm().unwrap();
    driver.vring().next_used_by_spinning(PATIENCE).unwrap();
    driver.send_attach(payload).unwrap();
    driver.wait_attach().unwrap()
}

/// Reads a block into memory at a guest-physical address. Gives the result.
pub(super) fn try_read(driver: &mut RingDriver, gpa: u64) -> i32 {
    driver.perform(driver.sqe_at(false, gpa, 512, 0, 3).unwrap()).unwrap()
}

/// Writes arbitrary words to the driver's and the device's words, except the detach word, which would end it all, and kicks.
pub(super) fn scribble(driver: &mut RingDriver, word: u32) {
    let base = driver.payload().control_gpa.get();
    let vring = driver.vring();
    let write = |value: u32, offset: u64| vring.ram().memory().write_obj(value, GuestAddress(base + offset)).unwrap();
    for offset in [0, 4, 8, 36, 256, 264] {
        write(word.wrapping_mul(0x9e37_79b9) ^ offset as u32, offset);
    }
    // The words that the device waits for, too.
    write(word << 2 | 3, 256);
    vring.kick().unwrap();
}
