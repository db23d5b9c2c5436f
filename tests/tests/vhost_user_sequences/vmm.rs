//! A VMM's end of the connection: the messages that every sequence has, and the I/O of its guest.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::front_end::{
    blk::{BlkDriver, SECTOR_BYTES},
    connection::u64_of,
    event::Eventfds,
    rig::TestRam,
    session::bit,
    vring::{DriverVring, VringLayout},
    wire::{FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, Message, Wire},
};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserMemory, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures, VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use virtio_bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use vm_memory::ByteValued;

use crate::DISK_BYTES;

pub(crate) const QUEUES: u16 = 2;
const PATIENCE: Duration = Duration::from_secs(20);
/// The length of `virtio_blk_config`, up to and including `write_zeroes_may_unmap` and its padding.
pub(crate) const CONFIG_BYTES: u32 = 60;

/// The feature of the connection itself, which no guest acknowledges.
pub(crate) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A VMM's end of the connection.
pub(crate) struct Vmm {
    wire: Wire,
    /// Whether every message has the flag NEED_REPLY from now on.
    pub(crate) always_needs_reply: bool,
    pub(crate) features: u64,
}

impl Vmm {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        Ok(Self { wire: Wire::connect(socket, PATIENCE)?, always_needs_reply: false, features: 0 })
    }

    fn flags(&self) -> u32 {
        if self.always_needs_reply { FLAG_VERSION | FLAG_NEED_REPLY } else { FLAG_VERSION }
    }

    /// Sends a message that needs no answer. It waits for one if every message needs a reply.
    pub(crate) fn tell(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        if self.always_needs_reply {
            return self.tell_acked(request, body, fds);
        }
        self.wire.send(request as u32, self.flags(), body, fds).with_context(|| format!("{request:?}"))
    }

    /// Sends a message and waits for its acknowledgement.
    pub(crate) fn tell_acked(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.wire.send(request as u32, FLAG_VERSION | FLAG_NEED_REPLY, body, fds)?;
        let code = u64_of(&self.answer(request)?)?;
        ensure!(code == 0, "{request:?} was refused with {code}");
        Ok(())
    }

    pub(crate) fn ask(&self, request: FrontendReq, body: &[u8]) -> Result<Message> {
        self.wire.send(request as u32, self.flags(), body, &[])?;
        self.answer(request)
    }

    fn answer(&self, request: FrontendReq) -> Result<Message> {
        let answer = self.wire.receive().with_context(|| format!("{request:?}"))?;
        let answer = answer.with_context(|| format!("{request:?}: the back-end closed the connection"))?;
        ensure!(answer.request == request as u32, "the answer to {request:?} is to request {}", answer.request);
        ensure!(answer.flags == FLAG_VERSION | FLAG_REPLY, "{request:?}: flags {:#x}", answer.flags);
        Ok(answer)
    }

    pub(crate) fn ask_u64(&self, request: FrontendReq) -> Result<u64> {
        u64_of(&self.ask(request, &[])?).with_context(|| format!("{request:?}"))
    }

    pub(crate) fn tell_u64(&self, request: FrontendReq, value: u64) -> Result<()> {
        self.tell(request, &value.to_ne_bytes(), &[])
    }

    pub(crate) fn tell_vring(&self, request: FrontendReq, index: u16, number: u32) -> Result<()> {
        self.tell(request, VhostUserVringState::new(index.into(), number).as_slice(), &[])
    }

    pub(crate) fn tell_fd(&self, request: FrontendReq, index: u16, fd: BorrowedFd<'_>) -> Result<()> {
        self.tell(request, &u64::from(index).to_ne_bytes(), &[fd])
    }

    pub(crate) fn tell_addr(&self, ram: &TestRam, index: u16, layout: &VringLayout) -> Result<()> {
        let [desc, used, avail] =
            [layout.desc_gpa, layout.used_gpa, layout.avail_gpa].map(|gpa| ram.ram.user_addr(gpa));
        let addr = VhostUserVringAddr::new(index.into(), VhostUserVringAddrFlags::empty(), desc?, used?, avail?, 0);
        self.tell(FrontendReq::SET_VRING_ADDR, addr.as_slice(), &[])
    }

    pub(crate) fn tell_mem_table(&self, ram: &TestRam) -> Result<()> {
        let regions = ram.ram.regions();
        let mut body = VhostUserMemory::new(u32::try_from(regions.len())?).as_slice().to_vec();
        regions.iter().for_each(|region| body.extend_from_slice(region.message().as_slice()));
        let files: Vec<&File> = regions.iter().map(|region| region.file()).collect();
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
        self.tell(FrontendReq::SET_MEM_TABLE, &body, &fds)
    }

    /// Reads a part of the configuration space.
    pub(crate) fn ask_config(
        &self,
        offset_bytes: u32,
        size_bytes: u32,
        flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let header = VhostUserConfig::new(offset_bytes, size_bytes, flags);
        let answer = self.ask(FrontendReq::GET_CONFIG, &[header.as_slice(), &vec![0; size_bytes as usize]].concat())?;
        ensure!(answer.body.len() == 12 + size_bytes as usize, "GET_CONFIG: {} bytes", answer.body.len());
        ensure!(answer.body[..8] == header.as_slice()[..8], "GET_CONFIG is answered with another offset or size");
        Ok(answer.body[12..].to_vec())
    }

    pub(crate) fn ask_capacity(&self, offset_bytes: u32, size_bytes: u32) -> Result<()> {
        let config = self.ask_config(offset_bytes, size_bytes, VhostUserConfigFlags::WRITABLE)?;
        ensure!(config[..8] == (DISK_BYTES / SECTOR_BYTES).to_le_bytes(), "capacity {:?}", &config[..8]);
        Ok(())
    }

    pub(crate) fn ask_vring_base(&self, index: u16) -> Result<u32> {
        let answer = self.ask(FrontendReq::GET_VRING_BASE, VhostUserVringState::new(index.into(), 0).as_slice())?;
        ensure!(answer.body.len() == 8 && answer.body[..4] == u32::from(index).to_ne_bytes(), "{:?}", answer.body);
        Ok(u32::from_ne_bytes(answer.body[4..].try_into()?))
    }

    /// Negotiates the virtio features of the connection: those that the VMM has and the back-end offers.
    pub(crate) fn negotiate(&mut self, has: u64) -> Result<()> {
        self.features = self.ask_u64(FrontendReq::GET_FEATURES)? & has;
        ensure!(self.features & bit(VIRTIO_F_VERSION_1) != 0, "features {:#x}", self.features);
        Ok(())
    }

    pub(crate) fn negotiate_protocol(&self, has: VhostUserProtocolFeatures) -> Result<VhostUserProtocolFeatures> {
        let offered = self.ask_u64(FrontendReq::GET_PROTOCOL_FEATURES)?;
        let taken = VhostUserProtocolFeatures::from_bits_truncate(offered) & has;
        ensure!(taken == has, "the back-end lacks {:?}", has.difference(taken));
        self.tell_u64(FrontendReq::SET_PROTOCOL_FEATURES, taken.bits())?;
        Ok(taken)
    }

    pub(crate) fn vring(&self, ram: &mut TestRam) -> Result<DriverVring> {
        let layout = VringLayout::take(&mut ram.arenas[0], 64)?;
        let event_idx = self.features & bit(VIRTIO_RING_F_EVENT_IDX) != 0;
        DriverVring::new(&ram.ram, layout, event_idx, Eventfds::new()?)
    }

    pub(crate) fn vrings(&self, ram: &mut TestRam, count: u16) -> Result<Vec<DriverVring>> {
        (0..count).map(|_| self.vring(ram)).collect()
    }
}

/// Writes and reads in each queue, and returns the drivers.
pub(crate) fn do_io(vrings: Vec<DriverVring>, ram: &mut TestRam) -> Result<Vec<BlkDriver>> {
    let mut drivers = Vec::new();
    for (index, vring) in (0u8..).zip(vrings) {
        let mut driver = BlkDriver::new(vring, &mut ram.arenas[0], 8192)?;
        let content: Vec<u8> = (0..8192u32).map(|at| (at / 3) as u8 ^ index).collect();
        let sector = u64::from(index) * 64;
        driver.write(sector, &content)?;
        driver.flush()?;
        ensure!(driver.read(sector, 8192)? == content, "queue {index}: the read returned other data");
        drivers.push(driver);
    }
    Ok(drivers)
}

pub(crate) fn ensure_bases(vmm: &Vmm, drivers: &mut [BlkDriver]) -> Result<()> {
    for (index, driver) in (0u16..).zip(drivers) {
        let base = vmm.ask_vring_base(index)?;
        ensure!(base == u32::from(driver.vring().next_avail()), "vring {index} stopped at {base}");
    }
    Ok(())
}
