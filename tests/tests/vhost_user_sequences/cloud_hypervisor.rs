//! Cloud Hypervisor.

use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use ringpass_tests::front_end::{rig::TestRam, session::bit, shared::InflightRegion};
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
use vm_memory::ByteValued;

use crate::vmm::{CONFIG_BYTES, QUEUES, Vmm, do_io};

/// Cloud Hypervisor v53.0, and v50.0, which reads the configuration space at offset 0x100. The source is
/// `virtio-devices/src/vhost_user/vu_common_ctrl.rs` (`negotiate_features_vhost_user`, `setup_vhost_user`,
/// `reset_vhost_user`) and `blk.rs`. `frontend.rs` of the `vhost` crate sets NEED_REPLY on every message from the
/// negotiation on, also on messages that have an answer.
pub(crate) fn sequence(vmm: &mut Vmm, ram: &mut TestRam, config_offset_bytes: u32) -> Result<()> {
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
    // A guest that boots: first the firmware's driver, then the kernel's.
    for _ in 0..2 {
        // The back-end offers LOG_ALL from the start, and the VMM sets it only when a migration begins.
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
