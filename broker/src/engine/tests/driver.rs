//! The driver's side of split virtqueues, as far as tests of the engine need it.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::PollContext;

use crate::vhost_user::{DeviceMemory, QueueEventfds};
use crate::virtqueue::{InflightQueue, QueueSetup};

/// How long a test waits for something that must happen. Much longer than it takes, also on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;

/// The guest's RAM: a memfd in two regions that adjoin in the guest and not in the host.
#[derive(Clone)]
pub(super) struct Ram {
    file: Arc<File>,
    region_bytes: u64,
    /// The driver's own mapping.
    pub(super) memory: GuestMemoryMmap,
}

impl Ram {
    pub(super) fn new(len_bytes: u64) -> Self {
        let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, len_bytes).unwrap();
        let (file, region_bytes) = (Arc::new(file), len_bytes / 2);
        let memory = map(&file, region_bytes);
        Self { file, region_bytes, memory }
    }

    /// The memfd.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// A mapping for the device.
    pub(super) fn device_memory(&self) -> Arc<DeviceMemory> {
        Arc::new(map(&self.file, self.region_bytes))
    }
}

fn map(file: &Arc<File>, region_bytes: u64) -> GuestMemoryMmap {
    let region = |number: u64| {
        let offset = FileOffset::from_arc(file.clone(), number * region_bytes);
        (GuestAddress(number * region_bytes), region_bytes as usize, Some(offset))
    };
    GuestMemoryMmap::from_ranges_with_files([region(0), region(1)]).unwrap()
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffer {
    pub(super) gpa: u64,
    pub(super) len_bytes: u32,
    pub(super) writable: bool,
}

/// A used element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) head: u16,
    pub(super) len_bytes: u32,
}

/// The driver's side of one virtqueue.
pub(super) struct DriverQueue {
    memory: GuestMemoryMmap,
    pub(super) size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    indirect_tables: u64,
    pub(super) event_idx: bool,
    /// The features that its driver accepted of the device.
    pub(super) blk_features: u64,
    pub(super) indirect: bool,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    avail_idx: u16,
    last_used: u16,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
}

/// Room that one queue takes in RAM.
pub(super) const QUEUE_RAM_BYTES: u64 = 1 << 20;
const INDIRECT_ENTRIES: u64 = 128;

impl DriverQueue {
    /// A queue whose rings lie at `gpa`.
    pub(super) fn new(ram: &Ram, gpa: u64, size: u16) -> Self {
        assert!(size <= 256);
        // As a driver does that starts: the rings are empty.
        ram.memory.write_slice(&[0; 0x1_0000], GuestAddress(gpa)).unwrap();
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        Self {
            memory: ram.memory.clone(),
            size,
            desc: gpa,
            avail: gpa + 0x4000,
            used: gpa + 0x8000,
            indirect_tables: gpa + 0x1_0000,
            event_idx: false,
            blk_features: !(1 << VIRTIO_RING_F_EVENT_IDX),
            indirect: false,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            avail_idx: 0,
            last_used: 0,
            kick: eventfd(),
            call: eventfd(),
        }
    }

    pub(super) fn setup(&self, next_avail: u16, inflight: Option<InflightQueue>) -> QueueSetup {
        QueueSetup {
            size: self.size,
            desc_table: GuestAddress(self.desc),
            avail_ring: GuestAddress(self.avail),
            used_ring: GuestAddress(self.used),
            next_avail,
            driver_features: self.blk_features | u64::from(self.event_idx) << VIRTIO_RING_F_EVENT_IDX,
            used_log_gpa: Some(self.used),
            inflight,
        }
    }

    pub(super) fn eventfds(&self) -> QueueEventfds {
        QueueEventfds {
            kick: Some(self.kick.try_clone().unwrap()),
            call: Some(self.call.try_clone().unwrap()),
            err: None,
        }
    }

    /// Guest-physical address of the used ring.
    pub(super) fn used_ring(&self) -> u64 {
        self.used
    }

    fn store_u16(&self, gpa: u64, value: u16) {
        self.memory.store(value.to_le(), GuestAddress(gpa), Ordering::Release).unwrap();
    }

    fn load_u16(&self, gpa: u64) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(gpa), Ordering::Acquire).unwrap())
    }

    fn put_descriptor(&self, table: u64, index: u16, gpa: u64, len_bytes: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&len_bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    /// Whether a chain of this many buffers has room.
    pub(super) fn has_room(&self, buffers: usize) -> bool {
        self.free.len() >= if self.indirect { 1 } else { buffers }
    }

    /// Makes a chain available, without a kick.
    pub(super) fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let flags = |number: usize, buffer: &Buffer| {
            (if buffer.writable { DESC_F_WRITE } else { 0 }) | if number + 1 < buffers.len() { DESC_F_NEXT } else { 0 }
        };
        let heads: Vec<u16> = if self.indirect {
            let head = self.free.pop().expect("a free descriptor");
            let table = self.indirect_tables + u64::from(head) * INDIRECT_ENTRIES * 16;
            for (number, buffer) in buffers.iter().enumerate() {
                let next = number as u16 + 1;
                self.put_descriptor(table, number as u16, buffer.gpa, buffer.len_bytes, flags(number, buffer), next);
            }
            self.put_descriptor(self.desc, head, table, buffers.len() as u32 * 16, DESC_F_INDIRECT, 0);
            vec![head]
        } else {
            let heads = self.free.split_off(self.free.len() - buffers.len());
            for (number, buffer) in buffers.iter().enumerate() {
                let next = heads.get(number + 1).copied().unwrap_or(0);
                let flags = flags(number, buffer);
                self.put_descriptor(self.desc, heads[number], buffer.gpa, buffer.len_bytes, flags, next);
            }
            heads
        };
        let head = heads[0];
        self.chains.insert(head, heads);
        self.add_head(head);
        head
    }

    /// Makes a descriptor available, whatever it is.
    pub(super) fn add_head(&mut self, head: u16) {
        self.store_u16(self.avail + 4 + u64::from(self.avail_idx % self.size) * 2, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.store_u16(self.avail + 2, self.avail_idx);
    }

    /// Overwrites the available index.
    pub(super) fn set_avail_idx(&mut self, avail_idx: u16) {
        self.store_u16(self.avail + 2, avail_idx);
    }

    /// Kicks, if the device wants that since `before` chains were available.
    pub(super) fn kick_if_wanted(&mut self, added: u16) {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.load_u16(self.used + 4 + u64::from(self.size) * 8);
            self.avail_idx.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            self.load_u16(self.used) & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
    }

    /// A chain that came back.
    pub(super) fn reap(&mut self) -> Option<Used> {
        if self.load_u16(self.used + 2) == self.last_used {
            return None;
        }
        let element = self.used + 4 + u64::from(self.last_used % self.size) * 8;
        let head = u32::from_le(self.memory.read_obj(GuestAddress(element)).unwrap()) as u16;
        let len_bytes = u32::from_le(self.memory.read_obj(GuestAddress(element + 4)).unwrap());
        self.last_used = self.last_used.wrapping_add(1);
        let heads = self.chains.remove(&head).expect("a chain that came back was made available");
        self.free.extend(heads);
        Some(Used { head, len_bytes })
    }

    /// The used index as the device has it.
    pub(super) fn used_idx(&self) -> u16 {
        self.load_u16(self.used + 2)
    }

    /// Whether interrupts are wanted.
    pub(super) fn want_interrupts(&mut self, wanted: bool) {
        if self.event_idx {
            let event = if wanted { self.last_used } else { self.last_used.wrapping_sub(1) };
            self.store_u16(self.avail + 4 + u64::from(self.size) * 2, event);
        } else {
            self.store_u16(self.avail, u16::from(!wanted));
        }
        fence(Ordering::SeqCst);
    }

    /// Polls the used ring until a chain comes back.
    pub(super) fn wait_by_polling(&mut self) -> Used {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.reap() {
                return used;
            }
            assert!(Instant::now() < end, "no chain came back");
            std::thread::yield_now();
        }
    }

    /// Sleeps until an interrupt tells of a chain that came back. A lost interrupt fails the test.
    pub(super) fn wait_by_interrupt(&mut self) -> Used {
        loop {
            self.want_interrupts(true);
            if let Some(used) = self.reap() {
                return used;
            }
            assert!(wait_readable(&self.call, PATIENCE), "no interrupt came, and no chain came back");
            self.call.read().unwrap();
        }
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
        assert!(Instant::now() < end, "{what} did not come about");
        std::thread::sleep(Duration::from_micros(200));
    }
}
