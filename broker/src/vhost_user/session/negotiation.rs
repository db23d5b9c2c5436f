//! Features, protocol features, device status; reset.

use tracing::debug;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_RO;
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{RequestError, Session};

/// VHOST_F_LOG_ALL: the pages that the device writes are logged.
const FEATURE_LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES: SET_VRING_ENABLE says which rings are enabled.
const FEATURE_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Those of the device type (VIRTIO 1.2, 2.2).
const DEVICE_FEATURES: u64 = 0xff_ffff;
/// Features that a driver may not use if the device does not know it: those of the device type, on which
/// it relies, and those that change its rings. Others are harmless when ignored, and QEMU accepts some in the guest's name that it does
/// not ask the back-end about (VIRTIO_F_ANY_LAYOUT, for example).
///
/// Features that a driver did not accept and uses all the same are not insisted on where that costs nothing, as in QEMU and SPDK:
/// - VIRTIO_F_VERSION_1. Without it the driver has the legacy interface: SeaBIOS on `disable-modern=on`, old guests. For this
///   device that differs in the byte order, which is the guest's own. It is little-endian, as on the hosts that ringpass runs
///   on; a front-end with another guest asks for VHOST_USER_PROTOCOL_F_CROSS_ENDIAN, which is not offered.
/// - VIRTIO_RING_F_INDIRECT_DESC. See `virtqueue/chain.rs`.
/// - VIRTIO_BLK_F_MQ. Queues beyond the first work as it does, and front-ends start all queues, whatever the driver accepted.
/// - VIRTIO_BLK_F_BLK_SIZE, _SIZE_MAX, _SEG_MAX, _TOPOLOGY only tell of limits, which hold in any case.
const FEATURES_NOT_TO_IGNORE: u64 = DEVICE_FEATURES
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_F_ACCESS_PLATFORM
    | 1 << VIRTIO_F_RING_PACKED
    | 1 << VIRTIO_F_IN_ORDER;

/// The protocol features: exactly those that are implemented, because QEMU accepts whatever it finds here.
pub(super) const OFFERED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::STATUS);

/// What was agreed.
#[derive(Debug)]
pub(super) struct Negotiation {
    protocol_features: VhostUserProtocolFeatures,
    /// VIRTIO features of the driver, once it has said so.
    driver_features: Option<u64>,
    /// VHOST_USER_F_PROTOCOL_FEATURES was accepted.
    has_protocol_features: bool,
    /// The device status of VIRTIO 1.2, 2.1.
    pub(super) status: u8,
}

impl Default for Negotiation {
    fn default() -> Self {
        Self {
            protocol_features: VhostUserProtocolFeatures::empty(),
            driver_features: None,
            has_protocol_features: false,
            status: 0,
        }
    }
}

impl Negotiation {
    pub(super) fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features.contains(feature)
    }

    pub(super) fn require(&self, feature: VhostUserProtocolFeatures, name: &'static str) -> Result<(), RequestError> {
        if self.has(feature) { Ok(()) } else { Err(RequestError::NotNegotiated { feature: name }) }
    }

    /// The driver's features for a ring that starts. A driver that has not said anything has accepted nothing.
    pub(super) fn driver_features(&self) -> u64 {
        self.driver_features.unwrap_or(0)
    }

    pub(super) fn has_driver_features(&self) -> bool {
        self.driver_features.is_some()
    }

    /// Whether rings are enabled before SET_VRING_ENABLE says anything.
    pub(super) fn are_rings_enabled_at_first(&self) -> bool {
        !self.has_protocol_features
    }
}

impl Session<'_> {
    pub(super) fn offered_features(&self) -> u64 {
        self.device.device_features() | FEATURE_LOG_ALL | FEATURE_PROTOCOL_FEATURES
    }

    /// How a server has to be started for a driver that accepted these features.
    fn as_it_was(&self, features: u64) -> &'static str {
        let read_only = 1 << VIRTIO_BLK_F_RO;
        match (features & read_only != 0, self.offered_features() & read_only != 0) {
            (true, false) => "with --read-only",
            // A read-only disk has neither discard nor write zeroes.
            (false, true) => "without --read-only",
            _ => "with a disk, file system and --direct-io as before",
        }
    }

    /// Also turns logging on and off, while rings run: QEMU waits for the reply and then relies on it.
    pub(super) fn set_features(&mut self, features: u64) -> Result<(), RequestError> {
        let unoffered = features & !self.offered_features();
        if unoffered & FEATURES_NOT_TO_IGNORE != 0 {
            let bits = unoffered & FEATURES_NOT_TO_IGNORE;
            return Err(RequestError::UnofferedFeatures { bits, as_it_was: self.as_it_was(features) });
        }
        if unoffered != 0 {
            debug!(bits = format_args!("{unoffered:#x}"), "features that were not offered are ignored");
        }
        let driver_features = features & self.device.device_features();
        if self.negotiation.driver_features != Some(driver_features) {
            self.set_driver_features(driver_features)?;
        }
        self.negotiation.has_protocol_features = features & FEATURE_PROTOCOL_FEATURES != 0;
        self.set_log_all(features & FEATURE_LOG_ALL != 0);
        self.apply_enabled_to_all();
        Ok(())
    }

    /// Rings that are started but disabled are stopped: Cloud Hypervisor resets a device by disabling its rings, and the
    /// next driver's set-up follows.
    fn set_driver_features(&mut self, features: u64) -> Result<(), RequestError> {
        if let Some(index) = self.vrings.iter().position(|vring| vring.is_started && vring.is_enabled_in_device) {
            let from = self.negotiation.driver_features.unwrap_or(0);
            return Err(RequestError::FeaturesWhileRunning { from, to: features, index });
        }
        self.stop_all()?;
        self.device.set_driver_features(features);
        self.negotiation.driver_features = Some(features);
        self.keep_record();
        Ok(())
    }

    /// A driver whose ring starts has accepted features. If the front-end has not sent any, these are none, whatever a front-end
    /// before it has sent.
    pub(super) fn settle_driver_features(&mut self) {
        if self.negotiation.driver_features.is_none() {
            self.device.set_driver_features(0);
            self.negotiation.driver_features = Some(0);
        }
    }

    pub(super) fn set_protocol_features(&mut self, features: u64) -> Result<(), RequestError> {
        let bits = features & !OFFERED.bits();
        if bits != 0 {
            return Err(RequestError::UnofferedProtocolFeatures { bits });
        }
        self.negotiation.protocol_features = VhostUserProtocolFeatures::from_bits_truncate(features);
        Ok(())
    }

    /// A status of 0 is the driver's reset. QEMU sends it whenever it stops the device, also for `stop` and before a
    /// migration: the memory, the in-flight region and the eventfds stay, as QEMU counts on.
    ///
    /// What the driver wrote to the configuration space stays, too. QEMU has a copy of it, which it shows to the guest over
    /// `stop` and over resets, and does not write again: a device that went back to a write-back cache would lose writes
    /// that the guest takes for stable.
    pub(super) fn set_status(&mut self, status: u8) -> Result<(), RequestError> {
        if status == 0 {
            self.stop_all()?;
            self.begin_inflight_again();
            self.forget_log_if_all_stopped();
            self.negotiation.driver_features = None;
        }
        self.negotiation.status = status;
        Ok(())
    }

    /// Everything that a driver has set up is gone; the memory table, the channel and the protocol features are the
    /// front-end's and stay.
    pub(super) fn reset_device(&mut self) -> Result<(), RequestError> {
        self.set_status(0)?;
        self.set_log_all(false);
        self.inflight = None;
        self.vrings.iter_mut().for_each(super::Vring::reset);
        Ok(())
    }
}
