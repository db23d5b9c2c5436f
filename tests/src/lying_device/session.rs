//! The vhost-user protocol of one connection.

use std::{
    fs::File,
    io::Write,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use vhost::vhost_user::{
    Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    message::{
        VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
        VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
        VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
    },
};

use super::{
    DISK_BYTES, QUEUES, Shared, locked,
    queue::{Place, Queue},
    service,
};

const F_VERSION_1: u64 = 1 << 32;
const F_BLK_FLUSH: u64 = 1 << 9;
const F_BLK_MQ: u64 = 1 << 12;
/// Offset of `num_queues` in the configuration of virtio-blk.
const NUM_QUEUES_AT: usize = 34;
const CONFIG_BYTES: usize = 256;

#[derive(Debug, Default)]
struct Vring {
    place: Place,
    base: u16,
    kick: Option<File>,
    call: Arc<Mutex<Option<File>>>,
    is_enabled: bool,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<u16>>,
}

pub(super) struct Session {
    shared: Arc<Shared>,
    regions: Vec<VhostUserMemoryRegion>,
    vrings: Vec<Vring>,
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let vrings = (0..QUEUES).map(|_| Vring::default()).collect();
        Self { shared, regions: Vec::new(), vrings }
    }

    fn vring(&mut self, index: impl Into<u32>) -> Result<&mut Vring> {
        self.vrings.get_mut(index.into() as usize).ok_or(Error::InvalidParam)
    }

    /// From an address of the front-end's.
    fn gpa(&self, address: u64) -> Result<u64> {
        let holds = |region: &&VhostUserMemoryRegion| {
            let start = region.user_addr;
            (start..start + region.memory_size).contains(&address)
        };
        let region = self.regions.iter().find(holds).ok_or(Error::InvalidParam)?;
        Ok(address - region.user_addr + region.guest_phys_addr)
    }

    fn start_if_ready(&mut self, index: u32) -> Result<()> {
        let shared = self.shared.clone();
        let vring = self.vring(index)?;
        let Some(kick) = vring.kick.as_ref().filter(|_| vring.is_enabled && vring.running.is_none()) else {
            return Ok(());
        };
        let kick = kick.try_clone().map_err(Error::ReqHandlerError)?;
        let queue = Queue::new(shared, vring.place, vring.base, vring.call.clone()).map_err(Error::ReqHandlerError)?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = thread::spawn(move || service::serve(queue, index as u16, kick, &told));
        vring.running = Some(Running { stop, thread });
        Ok(())
    }
}

impl Vring {
    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop.store(true, Ordering::Release);
            if let Some(kick) = &mut self.kick {
                let _ = kick.write_all(&1_u64.to_ne_bytes());
            }
            match running.thread.join() {
                Ok(Ok(next)) => self.base = next,
                ended => eprintln!("the lying device: {ended:?}"),
            }
        }
        self.kick = None;
        self.is_enabled = false;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.vrings.iter_mut().for_each(Vring::stop);
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(F_VERSION_1 | F_BLK_FLUSH | F_BLK_MQ | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        _files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<vhost::VhostUserMemoryRegionBase>>> {
        self.regions = regions.to_vec();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.vring(index)?.place.size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let (desc, used, avail) = (self.gpa(descriptor)?, self.gpa(used)?, self.gpa(available)?);
        let place = &mut self.vring(index)?.place;
        *place = Place { size: place.size, desc, avail, used };
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.vring(index)?.base = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.stop();
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(index)?.kick = fd;
        self.start_if_ready(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        *locked(&self.vring(index)?.call) = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(QUEUES.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.is_enabled = enable;
        self.start_if_ready(index)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut config = vec![0; CONFIG_BYTES];
        config[..8].copy_from_slice(&(DISK_BYTES as u64 / 512).to_le_bytes());
        config[NUM_QUEUES_AT..NUM_QUEUES_AT + 2].copy_from_slice(&QUEUES.to_le_bytes());
        let asked = config.get(offset as usize..offset as usize + size as usize);
        asked.map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Ok(())
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {}

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidParam)
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidParam)
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(8)
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<vhost::VhostUserMemoryRegionBase>> {
        Err(Error::InvalidParam)
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidParam)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidParam)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidParam)
    }
}
