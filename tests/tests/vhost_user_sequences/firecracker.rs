//! Firecracker.

use std::os::fd::AsFd;

use anyhow::Result;
use ringpass_tests::front_end::{rig::TestRam, session::bit};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use virtio_bindings::{
    virtio_blk::VIRTIO_BLK_F_FLUSH, virtio_config::VIRTIO_F_VERSION_1, virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};

use crate::vmm::{CONFIG_BYTES, PROTOCOL_FEATURES, Vmm, do_io};

/// Firecracker at commit 81b38b9dad60 of 2026-08-21 (1.17.0-dev): `src/vmm/src/devices/virtio/vhost_user.rs`
/// (`negotiate_features`, `setup_backend`) and `block/vhost_user/device.rs`. It has one queue and only the protocol
/// feature CONFIG, wants no acknowledgements, and reads the configuration space before it sets the features. It never
/// stops a vring: the VM ends, and the connection with it.
pub(crate) fn sequence(vmm: &mut Vmm, ram: &mut TestRam) -> Result<()> {
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
    // Its API reads the configuration space again when the size has changed.
    vmm.ask_capacity(0, CONFIG_BYTES)
}
