//! The engine as the vhost-user session drives it: its [`Device`].

use std::error::Error;
use std::sync::Arc;

use ringpass_guest_abi::request::ErrorCode;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::attach::BuilderCommand;
use super::command::{Command, WhichEventfd};
use super::handle::Engine;
use super::reply::Pending;
use crate::vhost_user::{ConfigWriteError, Device, DeviceMemory, PeerWatch, QueueEventfds, RingFault};
use crate::virtio_blk::{CacheMode, Continuity, DeviceRecord};
use crate::virtqueue::{DirtyLog, QUEUE_SIZE_MAX, QueueSetup};

impl Engine {
    fn set_eventfd(&self, index: u16, which: WhichEventfd, eventfd: Option<EventFd>) {
        self.order(index, |queue, reply| Command::SetEventfd { queue, which, eventfd, reply });
    }

    fn device_record(&self) -> DeviceRecord {
        DeviceRecord::new(&self.device(), self.cache_mode.driver_features())
    }
}

/// Whether all regions of `before` are in `memory`, and are the same memory.
fn has_all(memory: &DeviceMemory, before: &DeviceMemory) -> bool {
    let same = |region: &GuestRegionMmap<()>, other: &GuestRegionMmap<()>| {
        (region.start_addr(), region.len(), region.as_ptr()) == (other.start_addr(), other.len(), other.as_ptr())
    };
    before.iter().all(|region| memory.iter().any(|other| same(region, other)))
}

impl Device for Engine {
    fn set_peer(&mut self, peer: Option<PeerWatch>) {
        self.peer = peer;
    }

    fn queue_count(&self) -> u16 {
        self.device().num_queues()
    }

    /// Front-ends set their rings up as their own configuration says. What the device is prepared for goes by the size in
    /// its configuration, and a longer ring waits.
    fn max_queue_size(&self) -> u16 {
        QUEUE_SIZE_MAX
    }

    fn device_features(&self) -> u64 {
        self.device().device_features()
    }

    fn set_driver_features(&mut self, features: u64) {
        self.cache_mode.set_driver_features(features);
        self.apply_cache_mode();
    }

    fn config_space(&self) -> Vec<u8> {
        self.device().to_bytes(self.cache_mode.writeback()).to_vec()
    }

    fn write_config(&mut self, offset_bytes: u32, bytes: &[u8]) -> Result<(), ConfigWriteError> {
        self.cache_mode.write_config(offset_bytes, bytes)?;
        self.apply_cache_mode();
        Ok(())
    }

    fn driver_settings(&self) -> u8 {
        self.cache_mode.settings()
    }

    fn restore_driver_settings(&mut self, settings: u8) {
        self.cache_mode.restore(settings);
        self.apply_cache_mode();
    }

    fn record(&self) -> Vec<u8> {
        self.device_record().to_bytes()
    }

    fn compare_record(&self, record: &[u8], queues_in_use: u16) -> Result<bool, Box<dyn Error + Send + Sync>> {
        let Some(earlier) = DeviceRecord::from_bytes(record) else { return Ok(false) };
        Ok(earlier.compare(&self.device_record(), queues_in_use)? == Continuity::Larger)
    }

    fn forget_driver(&mut self) {
        self.cache_mode = CacheMode::new();
        self.apply_cache_mode();
    }

    fn set_memory(&mut self, memory: Arc<DeviceMemory>) {
        let loses_some = self.memory.as_ref().is_some_and(|before| !has_all(&memory, before));
        // The builder first: no worker that knows this table has a ring made in the one before.
        let rings = self.control.attach.as_ref().map(|attach| {
            let (done, pending) = Pending::new();
            attach.command(BuilderCommand::SetMemory { memory: memory.clone(), loses_some, done });
            pending
        });
        self.order_all(|reply| Command::SetMemory { memory: memory.clone(), reply });
        // A front-end that takes memory away may give it to another process: no I/O may land there any more. The engine does not wait
        // until new memory is pinned, which takes long: until then a driver's requests in it go over queue 0 (docs/abi.md, section 7).
        if loses_some {
            self.order_all(|reply| Command::LeaveFormerMemory { reply });
            rings.map(|pending| self.wait(pending));
        }
        self.memory = Some(memory);
    }

    fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.is_logging = log.is_some();
        if let Some(attach) = &self.control.attach {
            let may_ask_again = !attach.rings.availability.set_logging(self.is_logging).is_empty();
            if self.is_logging {
                // The kernel logs nothing of what a ring writes. The guest need not be asked, nor could it answer: the
                // front-end waits for this with its locks held.
                self.order_all(|done| Command::FinishRings { reason: ErrorCode::Mode, done: Some(done) });
            } else if may_ask_again {
                attach.workers().tell_driver();
            }
        }
        self.order_all(|reply| Command::SetDirtyLog { log: log.clone(), reply });
    }

    fn set_used_log(&mut self, index: u16, used_log_gpa: Option<u64>) {
        self.order(index, |queue, reply| Command::SetUsedLog { queue, used_log_gpa, reply });
    }

    fn start_queue(&mut self, index: u16, setup: QueueSetup, eventfds: QueueEventfds) {
        if let (None, Some(attach)) = (&setup.inflight, &self.control.attach) {
            if attach.rings.availability.note_lack_of_records() {
                tracing::info!(
                    "no rings for this front-end: it keeps no in-flight region, so a restarted server could lose and repeat \
                     requests (use a front-end with INFLIGHT_SHMFD)"
                );
            }
        }
        self.started[usize::from(index)] = Some(setup.next_avail);
        self.control.started.set(index, true);
        self.send(index, |queue| Command::Start { queue, setup, eventfds });
        self.source.request();
    }

    fn break_queue(&mut self, index: u16, fault: RingFault, err: Option<EventFd>) {
        self.send(index, |queue| Command::Break { queue, fault, err });
    }

    fn stop_queue(&mut self, index: u16) -> Option<u16> {
        if self.control.attach.is_some() {
            // All queues stop as a rule, one after the other: their rings end side by side.
            self.control.send_to_all(|| Command::EndRings { reason: ErrorCode::None });
        }
        let stopped_at = self.order(index, |queue, reply| Command::Stop { queue, reply });
        if stopped_at.is_none() && self.is_peer_gone() {
            return None;
        }
        let started_at = self.started[usize::from(index)].take();
        self.control.started.set(index, false);
        // A worker that was shut down has taken nothing since.
        let next_avail = stopped_at.or(started_at).unwrap_or_default();
        let all_stopped = self.started.iter().all(Option::is_none);
        if let (true, Some(attach)) = (all_stopped, &self.control.attach) {
            // A device reset, as far as a back-end can see one.
            attach.rings.availability.clear_discard();
            attach.rings.availability.forget_lack_of_records();
        }
        if self.is_logging && all_stopped {
            // The guest is being migrated: the destination needs the disk.
            let is_wanted = || !self.peer.as_ref().is_some_and(PeerWatch::is_gone);
            self.source.release(&is_wanted);
            self.control.release_disk(is_wanted);
        }
        Some(next_avail)
    }

    fn set_enabled(&mut self, index: u16, enabled: bool) {
        self.order(index, |queue, reply| Command::SetEnabled { queue, is_enabled: enabled, reply });
    }

    fn set_call(&mut self, index: u16, call: Option<EventFd>) {
        self.set_eventfd(index, WhichEventfd::Call, call);
    }

    fn set_kick(&mut self, index: u16, kick: Option<EventFd>) {
        self.set_eventfd(index, WhichEventfd::Kick, kick);
    }

    fn set_err(&mut self, index: u16, err: Option<EventFd>) {
        self.set_eventfd(index, WhichEventfd::Err, err);
    }

    fn abandon(&mut self) {
        self.started.fill(None);
        self.control.started.set_none();
        self.memory = None;
        self.peer = None;
        self.control.send_to_all(|| Command::Abandon);
        if let Some(attach) = &self.control.attach {
            // The next front-end may have another guest. If it is the same one, its discards show again.
            attach.rings.availability.clear_discard();
            attach.rings.availability.forget_lack_of_records();
        }
        self.source.stop_waiting();
    }

    fn reset(&mut self) {
        self.started.fill(None);
        self.control.started.set_none();
        self.order_all(|reply| Command::Reset { reply });
        if let Some(attach) = &self.control.attach {
            attach.rings.availability.forget_lack_of_records();
        }
        self.forget_driver();
    }

    fn refresh_capacity(&mut self) -> Result<bool, Box<dyn Error + Send + Sync>> {
        let size_bytes = self.source.refresh_size_bytes()?;
        Ok(self.control.set_size_bytes(size_bytes)?)
    }
}
