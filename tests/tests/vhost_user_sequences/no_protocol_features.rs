//! A front-end without protocol features.

use std::os::fd::AsFd;

use anyhow::Result;
use ringpass_tests::front_end::{rig::TestRam, session::bit};
use vhost::vhost_user::message::FrontendReq;
use virtio_bindings::{
    virtio_blk::VIRTIO_BLK_F_FLUSH, virtio_config::VIRTIO_F_VERSION_1, virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
};

use crate::vmm::{Vmm, do_io, ensure_bases};

/// The first vhost-user (QEMU 2.1, and the specification's "Starting and stopping rings"): without
/// `VHOST_USER_F_PROTOCOL_FEATURES` there is one queue, no message is acknowledged, and a vring is enabled when it starts.
pub(crate) fn sequence(vmm: &mut Vmm, ram: &mut TestRam) -> Result<()> {
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
