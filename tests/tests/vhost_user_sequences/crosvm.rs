//! crosvm.

use std::os::{fd::AsFd, unix::net::UnixStream};

use anyhow::{Result, ensure};
use ringpass_tests::front_end::rig::TestRam;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

use crate::vmm::{PROTOCOL_FEATURES, QUEUES, Vmm, do_io};

/// crosvm at commit f1e797a68dad of 2026-08-21: `devices/src/virtio/vhost_user_frontend/mod.rs` (`new`, `read_config`,
/// `ack_features`, `activate_vring`, `deactivate_vring`). REPLY_ACK is negotiated and never used.
pub(crate) fn sequence(vmm: &mut Vmm, ram: &mut TestRam) -> Result<()> {
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
