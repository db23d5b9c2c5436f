//! A device that executes nothing: it records each call and asserts the contract of [`Device`].

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::connection::PeerWatch;
use super::device::{ConfigWriteError, Device, DeviceMemory, QueueEventfds};
use super::ring_fault::RingFault;
use crate::virtqueue::{DirtyLog, QueueSetup};

/// Number of queues of the fake device.
pub(super) const QUEUES: u16 = 3;
/// Their largest size.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;
/// Its features: VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, and two of virtio-blk.
pub(super) const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 9 | 1 << 6;
/// How many chains a fake queue takes in each run.
pub(super) const CHAINS_TAKEN: u16 = 7;
/// The only writable byte of its configuration space: `writeback`.
const WRITABLE_BYTE: u32 = 32;

/// A call to the device. Of eventfds it says only whether they are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Call {
    SetDriverFeatures(u64),
    WriteConfig(u32, Vec<u8>),
    /// Only recorded if the settings are not 0.
    RestoreDriverSettings(u8),
    /// Guest addresses and lengths of the regions.
    SetMemory(Vec<(u64, u64)>),
    SetDirtyLog(bool),
    SetUsedLog(u16, Option<u64>),
    Start(Started),
    Stop(u16),
    /// What the driver did wrong, and whether there is an error eventfd.
    Break(u16, RingFault, bool),
    SetEnabled(u16, bool),
    SetCallFd(u16, bool),
    SetKickFd(u16, bool),
    SetErrFd(u16, bool),
    Abandon,
    Reset,
    RefreshCapacity,
}

/// A queue that was started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Started {
    pub(super) index: u16,
    pub(super) size: u16,
    /// Descriptor table, available ring, used ring.
    pub(super) gpas: [u64; 3],
    pub(super) next_avail: u16,
    pub(super) driver_features: u64,
    pub(super) used_log_gpa: Option<u64>,
    pub(super) is_tracked: bool,
    /// Kick, call, error.
    pub(super) eventfds: [bool; 3],
}

/// The recorded calls, which outlive the device.
#[derive(Debug, Clone, Default)]
pub(super) struct Calls {
    made: Arc<Mutex<Vec<Call>>>,
    /// `stop_queue` returns `None`.
    pub(super) is_front_end_gone: Arc<AtomicBool>,
    /// The next `refresh_capacity` returns this.
    pub(super) is_resized: Arc<AtomicBool>,
    /// A reset waits until it can lock this, as it would for I/O under way.
    pub(super) last_io: Arc<Mutex<()>>,
}

impl Calls {
    /// The calls since the last `take`.
    pub(super) fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.made.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn push(&self, call: Call) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(call);
    }
}

/// The device.
#[derive(Debug, Default)]
pub(super) struct FakeDevice {
    pub(super) calls: Calls,
    /// The record that the device keeps for a successor process.
    pub(super) record: Vec<u8>,
    queues: [Option<FakeQueue>; QUEUES as usize],
    space: Space,
    _memory: Option<Arc<DeviceMemory>>,
    _log: Option<Arc<DirtyLog>>,
}

#[derive(Debug)]
struct FakeQueue {
    setup: QueueSetup,
    /// Held as a real device would hold them.
    eventfds: QueueEventfds,
}

#[derive(Debug)]
struct Space([u8; 60]);

impl Default for Space {
    fn default() -> Self {
        Self(std::array::from_fn(|at| at as u8))
    }
}

impl FakeDevice {
    fn started(&mut self, index: u16) -> &mut FakeQueue {
        let queue = self.queues.get_mut(usize::from(index)).expect("a valid queue index");
        queue.as_mut().expect("a started queue")
    }
}

impl Device for FakeDevice {
    /// No call waits for anything.
    fn set_peer(&mut self, _peer: Option<PeerWatch>) {}

    fn queue_count(&self) -> u16 {
        QUEUES
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn device_features(&self) -> u64 {
        FEATURES
    }

    fn set_driver_features(&mut self, features: u64) {
        assert_eq!(features & !FEATURES, 0, "features that were not offered");
        assert!(self.queues.iter().all(Option::is_none), "features come while no queue is started");
        self.calls.push(Call::SetDriverFeatures(features));
    }

    fn config_space(&self) -> Vec<u8> {
        self.space.0.to_vec()
    }

    fn write_config(&mut self, offset_bytes: u32, bytes: &[u8]) -> Result<(), ConfigWriteError> {
        match bytes {
            [value] if offset_bytes == WRITABLE_BYTE => self.space.0[WRITABLE_BYTE as usize] = *value,
            _ => {
                let end_bytes = u64::from(offset_bytes) + bytes.len() as u64;
                return Err(ConfigWriteError::NotWritable { offset_bytes, end_bytes });
            }
        }
        self.calls.push(Call::WriteConfig(offset_bytes, bytes.to_vec()));
        Ok(())
    }

    /// 1 if the writable byte is 0.
    fn driver_settings(&self) -> u8 {
        u8::from(self.space.0[WRITABLE_BYTE as usize] == 0)
    }

    fn restore_driver_settings(&mut self, settings: u8) {
        if settings & 1 != 0 {
            self.space.0[WRITABLE_BYTE as usize] = 0;
        }
        if settings != 0 {
            self.calls.push(Call::RestoreDriverSettings(settings));
        }
    }

    fn record(&self) -> Vec<u8> {
        self.record.clone()
    }

    /// The driver cannot go on with a device that has a different record.
    fn compare_record(&self, record: &[u8], _queues_in_use: u16) -> Result<bool, Box<dyn Error + Send + Sync>> {
        if record == self.record {
            Ok(self.calls.is_resized.load(Ordering::Relaxed))
        } else {
            Err("another device".into())
        }
    }

    fn forget_driver(&mut self) {
        self.space = Space::default();
    }

    fn set_memory(&mut self, memory: Arc<DeviceMemory>) {
        let regions = memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
        self._memory = Some(memory);
        self.calls.push(Call::SetMemory(regions));
    }

    fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.calls.push(Call::SetDirtyLog(log.is_some()));
        self._log = log;
    }

    fn set_used_log(&mut self, index: u16, used_log_gpa: Option<u64>) {
        self.started(index).setup.used_log_gpa = used_log_gpa;
        self.calls.push(Call::SetUsedLog(index, used_log_gpa));
    }

    fn start_queue(&mut self, index: u16, setup: QueueSetup, eventfds: QueueEventfds) {
        assert!(setup.size.is_power_of_two() && setup.size <= MAX_QUEUE_SIZE, "a checked size");
        let addresses = [(setup.desc_table, 16), (setup.avail_ring, 2), (setup.used_ring, 4)];
        assert!(addresses.iter().all(|(gpa, alignment)| gpa.0 % *alignment == 0), "aligned addresses");
        self.calls.push(Call::Start(Started {
            index,
            size: setup.size,
            gpas: [setup.desc_table.0, setup.avail_ring.0, setup.used_ring.0],
            next_avail: setup.next_avail,
            driver_features: setup.driver_features,
            used_log_gpa: setup.used_log_gpa,
            is_tracked: setup.inflight.is_some(),
            eventfds: [eventfds.kick.is_some(), eventfds.call.is_some(), eventfds.err.is_some()],
        }));
        let queue = self.queues[usize::from(index)].replace(FakeQueue { setup, eventfds });
        assert!(queue.is_none(), "a queue is started only once before it is stopped");
    }

    fn break_queue(&mut self, index: u16, fault: RingFault, err: Option<EventFd>) {
        assert!(self.queues[usize::from(index)].is_none(), "the session does not break a running queue");
        self.calls.push(Call::Break(index, fault, err.is_some()));
    }

    fn stop_queue(&mut self, index: u16) -> Option<u16> {
        self.calls.push(Call::Stop(index));
        if self.calls.is_front_end_gone.load(Ordering::Relaxed) {
            return None;
        }
        let queue = self.queues[usize::from(index)].take().expect("a started queue");
        Some(queue.setup.next_avail.wrapping_add(CHAINS_TAKEN))
    }

    fn set_enabled(&mut self, index: u16, enabled: bool) {
        self.started(index);
        self.calls.push(Call::SetEnabled(index, enabled));
    }

    fn set_call(&mut self, index: u16, call: Option<EventFd>) {
        self.calls.push(Call::SetCallFd(index, call.is_some()));
        self.started(index).eventfds.call = call;
    }

    fn set_kick(&mut self, index: u16, kick: Option<EventFd>) {
        self.calls.push(Call::SetKickFd(index, kick.is_some()));
        self.started(index).eventfds.kick = kick;
    }

    fn set_err(&mut self, index: u16, err: Option<EventFd>) {
        self.calls.push(Call::SetErrFd(index, err.is_some()));
        self.started(index).eventfds.err = err;
    }

    fn abandon(&mut self) {
        self.queues = Default::default();
        self.calls.push(Call::Abandon);
    }

    fn reset(&mut self) {
        self.queues = Default::default();
        self.calls.push(Call::Reset);
        drop(self.calls.last_io.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn refresh_capacity(&mut self) -> Result<bool, Box<dyn Error + Send + Sync>> {
        self.calls.push(Call::RefreshCapacity);
        Ok(self.calls.is_resized.swap(false, Ordering::Relaxed))
    }
}
