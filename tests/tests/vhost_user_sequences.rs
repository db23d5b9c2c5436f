//! The message sequences of VMMs that do not run here, and of those that do, replayed message by message.
//!
//! Each was read from a named version of the VMM's source. What they differ in is what back-ends get wrong: who wants
//! acknowledgements of what, the order of a vring's messages, how the configuration space is asked for, and what a stop is.

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    front_end::{
        blk::{BlkDriver, SECTOR_BYTES},
        connection::u64_of,
        event::Eventfds,
        rig::{Rig, TestRam},
        session::bit,
        shared::InflightRegion,
        vring::{DriverVring, VringLayout},
        wire::{FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, Message, Wire},
    },
    harness::{self, Test, test},
    needs::Need,
};
use vhost::vhost_user::message::{
    FrontendReq, VHOST_USER_CONFIG_OFFSET, VhostUserConfig, VhostUserConfigFlags, VhostUserInflight, VhostUserMemory,
    VhostUserProtocolFeatures, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddr,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use virtio_bindings::{
    virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH},
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
        VIRTIO_F_VERSION_1,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vm_memory::ByteValued;

const DISK_BYTES: u64 = 4 << 20;
const QUEUES: u16 = 2;
const PATIENCE: Duration = Duration::from_secs(20);
/// Length of `virtio_blk_config` up to and with `write_zeroes_may_unmap` and its padding.
const CONFIG_BYTES: u32 = 60;

type Sequence = fn(&mut Vmm, &mut TestRam) -> Result<()>;

fn main() -> ExitCode {
    let sequences: [(&str, Sequence); 6] = [
        ("cloud_hypervisor_53", |vmm, ram| cloud_hypervisor(vmm, ram, 0)),
        ("cloud_hypervisor_50", |vmm, ram| cloud_hypervisor(vmm, ram, VHOST_USER_CONFIG_OFFSET)),
        ("crosvm", crosvm),
        ("firecracker", firecracker),
        ("qemu_7_2", qemu),
        ("a_front_end_without_protocol_features", without_protocol_features),
    ];
    let tests: Vec<Test> = sequences
        .into_iter()
        .map(|(name, sequence)| {
            let needs = DiskKind::Ext4Direct.needs().into_iter().chain(broker_process::needs());
            let needs: Vec<Need> = needs.collect();
            test(format!("{name}_is_served_and_comes_back"), needs, move || replay(sequence))
        })
        .collect();
    harness::run(tests)
}

fn replay(sequence: Sequence) -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "2"])?;
    for time in ["the first", "the second"] {
        let mut ram = TestRam::new(2, 4 << 20)?;
        let result = Vmm::connect(&rig.socket()).and_then(|mut vmm| sequence(&mut vmm, &mut ram));
        broker.explain(result.with_context(|| format!("{time} time")))?;
    }
    Ok(())
}

/// A VMM's end of the connection.
struct Vmm {
    wire: Wire,
    /// Whether every message has the flag NEED_REPLY from now on.
    always_needs_reply: bool,
    features: u64,
}

impl Vmm {
    fn connect(socket: &Path) -> Result<Self> {
        Ok(Self { wire: Wire::connect(socket, PATIENCE)?, always_needs_reply: false, features: 0 })
    }

    fn flags(&self) -> u32 {
        if self.always_needs_reply { FLAG_VERSION | FLAG_NEED_REPLY } else { FLAG_VERSION }
    }

    /// A message that is not answered, unless everything is.
    fn tell(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        if self.always_needs_reply {
            return self.tell_acked(request, body, fds);
        }
        self.wire.send(request as u32, self.flags(), body, fds).with_context(|| format!("{request:?}"))
    }

    /// A message whose acknowledgement is waited for.
    fn tell_acked(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.wire.send(request as u32, FLAG_VERSION | FLAG_NEED_REPLY, body, fds)?;
        let code = u64_of(&self.answer(request)?)?;
        ensure!(code == 0, "{request:?} was refused with {code}");
        Ok(())
    }

    fn ask(&self, request: FrontendReq, body: &[u8]) -> Result<Message> {
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

    fn ask_u64(&self, request: FrontendReq) -> Result<u64> {
        u64_of(&self.ask(request, &[])?).with_context(|| format!("{request:?}"))
    }

    fn tell_u64(&self, request: FrontendReq, value: u64) -> Result<()> {
        self.tell(request, &value.to_ne_bytes(), &[])
    }

    fn tell_vring(&self, request: FrontendReq, index: u16, number: u32) -> Result<()> {
        self.tell(request, VhostUserVringState::new(index.into(), number).as_slice(), &[])
    }

    fn tell_fd(&self, request: FrontendReq, index: u16, fd: BorrowedFd<'_>) -> Result<()> {
        self.tell(request, &u64::from(index).to_ne_bytes(), &[fd])
    }

    fn tell_addr(&self, ram: &TestRam, index: u16, layout: &VringLayout) -> Result<()> {
        let [desc, used, avail] =
            [layout.desc_gpa, layout.used_gpa, layout.avail_gpa].map(|gpa| ram.ram.user_addr(gpa));
        let addr = VhostUserVringAddr::new(index.into(), VhostUserVringAddrFlags::empty(), desc?, used?, avail?, 0);
        self.tell(FrontendReq::SET_VRING_ADDR, addr.as_slice(), &[])
    }

    fn tell_mem_table(&self, ram: &TestRam) -> Result<()> {
        let regions = ram.ram.regions();
        let mut body = VhostUserMemory::new(u32::try_from(regions.len())?).as_slice().to_vec();
        regions.iter().for_each(|region| body.extend_from_slice(region.message().as_slice()));
        let files: Vec<&File> = regions.iter().map(|region| region.file()).collect();
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
        self.tell(FrontendReq::SET_MEM_TABLE, &body, &fds)
    }

    /// The configuration space, and that it has the disk's size where it begins.
    fn ask_config(&self, offset_bytes: u32, size_bytes: u32, flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let header = VhostUserConfig::new(offset_bytes, size_bytes, flags);
        let answer = self.ask(FrontendReq::GET_CONFIG, &[header.as_slice(), &vec![0; size_bytes as usize]].concat())?;
        ensure!(answer.body.len() == 12 + size_bytes as usize, "GET_CONFIG: {} bytes", answer.body.len());
        ensure!(answer.body[..8] == header.as_slice()[..8], "GET_CONFIG is answered with another offset or size");
        Ok(answer.body[12..].to_vec())
    }

    fn ask_capacity(&self, offset_bytes: u32, size_bytes: u32) -> Result<()> {
        let config = self.ask_config(offset_bytes, size_bytes, VhostUserConfigFlags::WRITABLE)?;
        ensure!(config[..8] == (DISK_BYTES / SECTOR_BYTES).to_le_bytes(), "capacity {:?}", &config[..8]);
        Ok(())
    }

    fn ask_vring_base(&self, index: u16) -> Result<u32> {
        let answer = self.ask(FrontendReq::GET_VRING_BASE, VhostUserVringState::new(index.into(), 0).as_slice())?;
        ensure!(answer.body.len() == 8 && answer.body[..4] == u32::from(index).to_ne_bytes(), "{:?}", answer.body);
        Ok(u32::from_ne_bytes(answer.body[4..].try_into()?))
    }

    /// Negotiates the virtio features of the connection: those that the VMM has, and the back-end offers.
    fn negotiate(&mut self, has: u64) -> Result<()> {
        self.features = self.ask_u64(FrontendReq::GET_FEATURES)? & has;
        ensure!(self.features & bit(VIRTIO_F_VERSION_1) != 0, "features {:#x}", self.features);
        Ok(())
    }

    fn negotiate_protocol(&self, has: VhostUserProtocolFeatures) -> Result<VhostUserProtocolFeatures> {
        let offered = self.ask_u64(FrontendReq::GET_PROTOCOL_FEATURES)?;
        let taken = VhostUserProtocolFeatures::from_bits_truncate(offered) & has;
        ensure!(taken == has, "the back-end lacks {:?}", has.difference(taken));
        self.tell_u64(FrontendReq::SET_PROTOCOL_FEATURES, taken.bits())?;
        Ok(taken)
    }

    fn vring(&self, ram: &mut TestRam) -> Result<DriverVring> {
        let layout = VringLayout::take(&mut ram.arenas[0], 64)?;
        let event_idx = self.features & bit(VIRTIO_RING_F_EVENT_IDX) != 0;
        DriverVring::new(&ram.ram, layout, event_idx, Eventfds::new()?)
    }

    fn vrings(&self, ram: &mut TestRam, count: u16) -> Result<Vec<DriverVring>> {
        (0..count).map(|_| self.vring(ram)).collect()
    }
}

/// Features of the connection itself, that no guest acknowledges.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Writes and reads in each queue, and gives the vrings back.
fn do_io(vrings: Vec<DriverVring>, ram: &mut TestRam) -> Result<Vec<BlkDriver>> {
    let mut drivers = Vec::new();
    for (index, vring) in (0u8..).zip(vrings) {
        let mut driver = BlkDriver::new(vring, &mut ram.arenas[0], 8192)?;
        let content: Vec<u8> = (0..8192u32).map(|at| (at / 3) as u8 ^ index).collect();
        let sector = u64::from(index) * 64;
        driver.write(sector, &content)?;
        driver.flush()?;
        ensure!(driver.read(sector, 8192)? == content, "queue {index}: another content came back");
        drivers.push(driver);
    }
    Ok(drivers)
}

fn ensure_bases(vmm: &Vmm, drivers: &mut [BlkDriver]) -> Result<()> {
    for (index, driver) in (0u16..).zip(drivers) {
        let base = vmm.ask_vring_base(index)?;
        ensure!(base == u32::from(driver.vring().next_avail()), "vring {index} stopped at {base}");
    }
    Ok(())
}

/// Cloud Hypervisor v53.0, and v50.0, which asks for the configuration space at offset 0x100:
/// `virtio-devices/src/vhost_user/vu_common_ctrl.rs` (`negotiate_features_vhost_user`, `setup_vhost_user`,
/// `reset_vhost_user`) and `blk.rs`; `frontend.rs` of the `vhost` crate sets NEED_REPLY on every message from the
/// negotiation on, also on those that have an answer.
fn cloud_hypervisor(vmm: &mut Vmm, ram: &mut TestRam, config_offset_bytes: u32) -> Result<()> {
    use VhostUserProtocolFeatures as Feature;
    vmm.tell(FrontendReq::SET_OWNER, &[], &[])?;
    vmm.negotiate(!bit(VIRTIO_BLK_F_CONFIG_WCE))?;
    vmm.negotiate_protocol(
        Feature::CONFIG
            | Feature::MQ
            | Feature::CONFIGURE_MEM_SLOTS
            | Feature::REPLY_ACK
            | Feature::INFLIGHT_SHMFD
            | Feature::LOG_SHMFD,
    )?;
    vmm.always_needs_reply = true;
    ensure!(vmm.ask_u64(FrontendReq::GET_QUEUE_NUM)? >= u64::from(QUEUES));
    vmm.ask_capacity(config_offset_bytes, CONFIG_BYTES)?;

    let mut inflight: Option<InflightRegion> = None;
    // A guest that reboots: the firmware's driver, then the kernel's.
    for _ in 0..2 {
        // LOG_ALL stays negotiated from the start: it has no log before a migration begins.
        vmm.tell_u64(FrontendReq::SET_FEATURES, vmm.features & !VhostUserVirtioFeatures::LOG_ALL.bits())?;
        vmm.tell_mem_table(ram)?;
        let vrings = vmm.vrings(ram, QUEUES)?;
        for (index, vring) in (0u16..).zip(&vrings) {
            vmm.tell_vring(FrontendReq::SET_VRING_NUM, index, vring.layout().size.into())?;
        }
        if inflight.is_none() {
            let size = VhostUserInflight::new(0, 0, QUEUES, 64);
            let mut answer = vmm.ask(FrontendReq::GET_INFLIGHT_FD, size.as_slice())?;
            let fd = answer.fds.pop().context("no descriptor of an in-flight region")?;
            let mut description = VhostUserInflight::default();
            description.as_mut_slice().copy_from_slice(&answer.body);
            inflight = Some(InflightRegion::new(description, fd));
        }
        let region = inflight.as_ref().context("made above")?;
        vmm.tell(FrontendReq::SET_INFLIGHT_FD, region.description().as_slice(), &[region.fd()])?;
        for (index, vring) in (0u16..).zip(&vrings) {
            vmm.tell_addr(ram, index, &vring.layout())?;
            vmm.tell_vring(FrontendReq::SET_VRING_BASE, index, 0)?;
            vmm.tell_fd(FrontendReq::SET_VRING_CALL, index, vring.eventfds().call().as_fd())?;
            vmm.tell_fd(FrontendReq::SET_VRING_KICK, index, vring.eventfds().kick().as_fd())?;
        }
        for index in 0..QUEUES {
            vmm.tell_vring(FrontendReq::SET_VRING_ENABLE, index, 1)?;
        }
        let mut drivers = do_io(vrings, ram)?;
        // Pause and resume.
        for enabled in [0, 1] {
            for index in 0..QUEUES {
                vmm.tell_vring(FrontendReq::SET_VRING_ENABLE, index, enabled)?;
            }
        }
        drivers.iter_mut().try_for_each(|driver| driver.read(0, 512).map(drop))?;
        for (index, driver) in (0u16..).zip(&mut drivers) {
            vmm.tell_vring(FrontendReq::SET_VRING_ENABLE, index, 0)?;
            let base = vmm.ask_vring_base(index)?;
            ensure!(base == u32::from(driver.vring().next_avail()), "vring {index} stopped at {base}");
        }
    }
    Ok(())
}

/// crosvm at commit f1e797a68dad of 2026-08-21: `devices/src/virtio/vhost_user_frontend/mod.rs` (`new`, `read_config`,
/// `ack_features`, `activate_vring`, `deactivate_vring`). REPLY_ACK is negotiated and never used.
fn crosvm(vmm: &mut Vmm, ram: &mut TestRam) -> Result<()> {
    use VhostUserProtocolFeatures as Feature;
    vmm.tell(FrontendReq::SET_OWNER, &[], &[])?;
    vmm.negotiate(!VhostUserVirtioFeatures::LOG_ALL.bits())?;
    vmm.negotiate_protocol(Feature::CONFIG | Feature::MQ | Feature::BACKEND_REQ | Feature::REPLY_ACK)?;
    let (_ours, theirs) = UnixStream::pair()?;
    vmm.tell(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
    drop(theirs);
    ensure!(vmm.ask_u64(FrontendReq::GET_QUEUE_NUM)? >= u64::from(QUEUES));

    for _ in 0..2 {
        // The guest reads the configuration space field by field, and acknowledges features in two halves.
        for (offset_bytes, size_bytes) in
            [(0, 4), (4, 4), (12, 4), (20, 4), (24, 1), (25, 1), (26, 2), (28, 4), (34, 2)]
        {
            vmm.ask_config(offset_bytes, size_bytes, VhostUserConfigFlags::WRITABLE)?;
        }
        vmm.ask_capacity(0, 8)?;
        for half in [vmm.features & 0xffff_ffff, vmm.features] {
            vmm.tell_u64(FrontendReq::SET_FEATURES, half | PROTOCOL_FEATURES)?;
        }
        vmm.tell_mem_table(ram)?;
        let vrings = vmm.vrings(ram, QUEUES)?;
        for (index, vring) in (0u16..).zip(&vrings) {
            vmm.tell_vring(FrontendReq::SET_VRING_NUM, index, vring.layout().size.into())?;
            vmm.tell_addr(ram, index, &vring.layout())?;
            vmm.tell_vring(FrontendReq::SET_VRING_BASE, index, 0)?;
            vmm.tell_fd(FrontendReq::SET_VRING_CALL, index, vring.eventfds().call().as_fd())?;
            vmm.tell_fd(FrontendReq::SET_VRING_KICK, index, vring.eventfds().kick().as_fd())?;
            vmm.tell_vring(FrontendReq::SET_VRING_ENABLE, index, 1)?;
        }
        let mut drivers = do_io(vrings, ram)?;
        for (index, driver) in (0u16..).zip(&mut drivers) {
            vmm.tell_vring(FrontendReq::SET_VRING_ENABLE, index, 0)?;
            let base = vmm.ask_vring_base(index)?;
            ensure!(base == u32::from(driver.vring().next_avail()), "vring {index} stopped at {base}");
        }
    }
    Ok(())
}

/// Firecracker at commit 81b38b9dad60 of 2026-08-21 (1.17.0-dev): `src/vmm/src/devices/virtio/vhost_user.rs`
/// (`negotiate_features`, `setup_backend`) and `block/vhost_user/device.rs`. One queue; of the protocol features only
/// CONFIG; nothing is acknowledged; the configuration space is asked for before the features are set. It is never stopped:
/// the VM ends, and the connection with it.
fn firecracker(vmm: &mut Vmm, ram: &mut TestRam) -> Result<()> {
    vmm.tell(FrontendReq::SET_OWNER, &[], &[])?;
    let has = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_BLK_F_FLUSH];
    vmm.negotiate(has.into_iter().map(bit).sum::<u64>() | PROTOCOL_FEATURES)?;
    vmm.negotiate_protocol(VhostUserProtocolFeatures::CONFIG)?;
    vmm.ask_capacity(0, CONFIG_BYTES)?;
    vmm.tell_u64(FrontendReq::SET_FEATURES, vmm.features)?;
    vmm.tell_mem_table(ram)?;
    let vring = vmm.vring(ram)?;
    vmm.tell_vring(FrontendReq::SET_VRING_NUM, 0, vring.layout().size.into())?;
    vmm.tell_addr(ram, 0, &vring.layout())?;
    vmm.tell_vring(FrontendReq::SET_VRING_BASE, 0, 0)?;
    vmm.tell_fd(FrontendReq::SET_VRING_CALL, 0, vring.eventfds().call().as_fd())?;
    vmm.tell_fd(FrontendReq::SET_VRING_KICK, 0, vring.eventfds().kick().as_fd())?;
    vmm.tell_vring(FrontendReq::SET_VRING_ENABLE, 0, 1)?;
    do_io(vec![vring], ram)?;
    // Its API asks again when the size has changed.
    vmm.ask_capacity(0, CONFIG_BYTES)
}

/// QEMU 7.2.0: `hw/block/vhost-user-blk.c`, `hw/virtio/vhost.c` (`vhost_dev_start`, `vhost_dev_stop`) and
/// `hw/virtio/vhost-user.c`. Only ADD_MEM_REG is acknowledged; call and error eventfds come before anything else of a
/// vring; the configuration space is 57 bytes long in some builds.
fn qemu(vmm: &mut Vmm, ram: &mut TestRam) -> Result<()> {
    use VhostUserProtocolFeatures as Feature;
    let offered = vmm.ask_u64(FrontendReq::GET_FEATURES)?;
    ensure!(offered & PROTOCOL_FEATURES != 0, "features {offered:#x}");
    vmm.negotiate_protocol(
        Feature::MQ
            | Feature::LOG_SHMFD
            | Feature::REPLY_ACK
            | Feature::BACKEND_REQ
            | Feature::CONFIG
            | Feature::INFLIGHT_SHMFD
            | Feature::RESET_DEVICE
            | Feature::CONFIGURE_MEM_SLOTS
            | Feature::STATUS,
    )?;
    ensure!(vmm.ask_u64(FrontendReq::GET_QUEUE_NUM)? >= u64::from(QUEUES));
    ensure!(vmm.ask_u64(FrontendReq::GET_MAX_MEM_SLOTS)? >= 2);
    let (_ours, theirs) = UnixStream::pair()?;
    vmm.tell_acked(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
    drop(theirs);
    vmm.tell(FrontendReq::SET_OWNER, &[], &[])?;
    vmm.negotiate(!VhostUserVirtioFeatures::LOG_ALL.bits())?;
    let masked = Eventfds::new()?;
    for index in 0..QUEUES {
        vmm.tell_fd(FrontendReq::SET_VRING_CALL, index, masked.call().as_fd())?;
        vmm.tell_fd(FrontendReq::SET_VRING_ERR, index, masked.kick().as_fd())?;
    }
    vmm.ask_config(0, 57, VhostUserConfigFlags::empty())?;
    vmm.ask_capacity(0, CONFIG_BYTES)?;

    for _ in 0..2 {
        let add_status = |status: u32| -> Result<()> {
            let before = vmm.ask_u64(FrontendReq::GET_STATUS)?;
            vmm.tell_u64(FrontendReq::SET_STATUS, before | u64::from(status))
        };
        vmm.tell_u64(FrontendReq::SET_FEATURES, vmm.features)?;
        add_status(VIRTIO_CONFIG_S_FEATURES_OK)?;
        let size = VhostUserInflight::new(0, 0, QUEUES, 64);
        let mut answer = vmm.ask(FrontendReq::GET_INFLIGHT_FD, size.as_slice())?;
        let fd = answer.fds.pop().context("no descriptor of an in-flight region")?;
        vmm.tell(FrontendReq::SET_INFLIGHT_FD, &answer.body, &[fd.as_fd()])?;
        vmm.tell_u64(FrontendReq::SET_FEATURES, vmm.features)?;
        add_status(VIRTIO_CONFIG_S_FEATURES_OK)?;
        for region in ram.ram.regions() {
            let message = region.message();
            let body = VhostUserSingleMemoryRegion::new(
                message.guest_phys_addr,
                message.memory_size,
                message.user_addr,
                message.mmap_offset,
            );
            vmm.tell_acked(FrontendReq::ADD_MEM_REG, body.as_slice(), &[region.file().as_fd()])?;
        }
        let vrings = vmm.vrings(ram, QUEUES)?;
        for (index, vring) in (0u16..).zip(&vrings) {
            vmm.tell_vring(FrontendReq::SET_VRING_NUM, index, vring.layout().size.into())?;
            vmm.tell_vring(FrontendReq::SET_VRING_BASE, index, 0)?;
            vmm.tell_addr(ram, index, &vring.layout())?;
            vmm.tell_fd(FrontendReq::SET_VRING_KICK, index, vring.eventfds().kick().as_fd())?;
        }
        for index in 0..QUEUES {
            vmm.tell_vring(FrontendReq::SET_VRING_ENABLE, index, 1)?;
        }
        add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_DRIVER_OK)?;
        // The guest's interrupts are unmasked, and every queue kicked once with nothing in it.
        for (index, vring) in (0u16..).zip(&vrings) {
            vmm.tell_fd(FrontendReq::SET_VRING_CALL, index, vring.eventfds().call().as_fd())?;
            vring.kick()?;
        }
        let mut drivers = do_io(vrings, ram)?;
        for index in 0..QUEUES {
            vmm.tell_vring(FrontendReq::SET_VRING_ENABLE, index, 0)?;
        }
        ensure_bases(vmm, &mut drivers)?;
        vmm.tell_u64(FrontendReq::SET_STATUS, 0)?;
        for region in ram.ram.regions() {
            let message = region.message();
            let body = VhostUserSingleMemoryRegion::new(
                message.guest_phys_addr,
                message.memory_size,
                message.user_addr,
                message.mmap_offset,
            );
            vmm.tell_acked(FrontendReq::REM_MEM_REG, body.as_slice(), &[region.file().as_fd()])?;
        }
        for index in 0..QUEUES {
            vmm.tell_fd(FrontendReq::SET_VRING_CALL, index, masked.call().as_fd())?;
        }
    }
    Ok(())
}

/// The first vhost-user (QEMU 2.1, and the specification's "Starting and stopping rings"): without
/// `VHOST_USER_F_PROTOCOL_FEATURES` there is one queue, no message is acknowledged, and a vring is enabled when it starts.
fn without_protocol_features(vmm: &mut Vmm, ram: &mut TestRam) -> Result<()> {
    vmm.negotiate(bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_RING_F_INDIRECT_DESC) | bit(VIRTIO_BLK_F_FLUSH))?;
    vmm.tell(FrontendReq::SET_OWNER, &[], &[])?;
    for _ in 0..2 {
        vmm.tell_u64(FrontendReq::SET_FEATURES, vmm.features)?;
        vmm.tell_mem_table(ram)?;
        let vring = vmm.vring(ram)?;
        vmm.tell_vring(FrontendReq::SET_VRING_NUM, 0, vring.layout().size.into())?;
        vmm.tell_vring(FrontendReq::SET_VRING_BASE, 0, 0)?;
        vmm.tell_addr(ram, 0, &vring.layout())?;
        vmm.tell_fd(FrontendReq::SET_VRING_KICK, 0, vring.eventfds().kick().as_fd())?;
        vmm.tell_fd(FrontendReq::SET_VRING_CALL, 0, vring.eventfds().call().as_fd())?;
        let mut drivers = do_io(vec![vring], ram)?;
        ensure_bases(vmm, &mut drivers)?;
    }
    Ok(())
}
