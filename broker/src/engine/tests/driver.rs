//! The driver of `ringpass-test-utils` on an engine: where its queues are, and set-ups and eventfds in the engine's
//! types.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ringpass_test_utils::event::Eventfds;
use ringpass_test_utils::ram::Ram;
use ringpass_test_utils::vring::{DriverVring, VringLayout};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::poll::PollContext;

pub(super) use ringpass_test_utils::PATIENCE;

use crate::vhost_user::{DeviceMemory, QueueEventfds};
use crate::virtqueue::{InflightQueue, InflightRegion, QueueSetup};

/// Room that one queue takes in RAM.
const QUEUE_RAM_BYTES: u64 = 1 << 20;
const AVAIL_OFFSET: u64 = 0x4000;
const USED_OFFSET: u64 = 0x8000;
const TABLES_OFFSET: u64 = 0x1_0000;

/// A mapping of RAM for the device.
pub(super) fn device_memory(ram: &Ram) -> Arc<DeviceMemory> {
    Arc::new(ram.map_again().unwrap().memory().clone())
}

/// The driver of an empty queue.
pub(super) fn vring(ram: &Ram, index: u16, size: u16) -> DriverVring {
    assert!(size <= 256);
    let gpa = u64::from(index) * QUEUE_RAM_BYTES;
    let layout = VringLayout { size, desc_gpa: gpa, avail_gpa: gpa + AVAIL_OFFSET, used_gpa: gpa + USED_OFFSET };
    DriverVring::new(ram, layout, false, Eventfds::new().unwrap()).unwrap()
}

/// Where a queue has room for indirect tables.
pub(super) fn indirect_tables_gpa(vring: &DriverVring) -> u64 {
    vring.layout().desc_gpa + TABLES_OFFSET
}

/// The set-up of a queue whose driver has accepted all features of the device.
pub(super) fn setup(vring: &DriverVring, next_avail: u16, inflight: Option<InflightQueue>) -> QueueSetup {
    let layout = vring.layout();
    QueueSetup {
        size: layout.size,
        desc_table: GuestAddress(layout.desc_gpa),
        avail_ring: GuestAddress(layout.avail_gpa),
        used_ring: GuestAddress(layout.used_gpa),
        next_avail,
        driver_features: all_features(vring),
        used_log_gpa: Some(layout.used_gpa),
        inflight,
    }
}

/// The same of a front-end that keeps records of requests in flight. Each start has a new region: the tests lose no device.
pub(super) fn recorded_setup(vring: &DriverVring, next_avail: u16) -> QueueSetup {
    let size = vring.layout().size;
    let file = InflightRegion::create(1, size).unwrap();
    let region = InflightRegion::from_fd(file.fd, 0, file.size_bytes, 1, size).unwrap();
    setup(vring, next_avail, region.queue(0))
}

/// All features of the device, and those of the ring that the driver uses.
fn all_features(vring: &DriverVring) -> u64 {
    features(vring, u64::MAX)
}

/// These features of the device, and those of the ring that the driver uses.
pub(super) fn features(vring: &DriverVring, device: u64) -> u64 {
    let event_idx = 1 << VIRTIO_RING_F_EVENT_IDX;
    device & !event_idx | if vring.has_event_idx() { event_idx } else { 0 }
}

/// Kick and call of a queue.
pub(super) fn eventfds(vring: &DriverVring) -> QueueEventfds {
    let eventfds = vring.eventfds();
    QueueEventfds {
        kick: Some(eventfds.kick().to_eventfd().unwrap()),
        call: Some(eventfds.call().to_eventfd().unwrap()),
        err: None,
    }
}

/// Waits until an eventfd is signalled. False: it was not.
pub(super) fn wait_readable(eventfd: &EventFd, timeout: Duration) -> bool {
    let context = PollContext::<u32>::new().unwrap();
    context.add(eventfd, 0).unwrap();
    context.wait_timeout(timeout).unwrap().iter_readable().next().is_some()
}

/// Waits until something is true.
pub(in crate::engine) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}
