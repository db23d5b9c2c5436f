//! QEMU.

use std::os::{fd::AsFd, unix::net::UnixStream};

use anyhow::{Context, Result, ensure};
use ringpass_tests::front_end::{event::Eventfds, rig::TestRam};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures, VhostUserSingleMemoryRegion,
    VhostUserVirtioFeatures,
};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
};
use vm_memory::ByteValued;

use crate::vmm::{CONFIG_BYTES, PROTOCOL_FEATURES, QUEUES, Vmm, do_io, ensure_bases};

/// QEMU 7.2.0: `hw/block/vhost-user-blk.c`, `hw/virtio/vhost.c` (`vhost_dev_start`, `vhost_dev_stop`) and
/// `hw/virtio/vhost-user.c`. QEMU wants acknowledgements of changes of memory regions and of SET_BACKEND_REQ_FD only.
/// It sends call and error eventfds before any other message of a vring. In some builds it reads 57 bytes of the
/// configuration space.
pub(crate) fn sequence(vmm: &mut Vmm, ram: &mut TestRam) -> Result<()> {
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
        // QEMU unmasks the guest's interrupts, and kicks every queue once while it is empty.
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
