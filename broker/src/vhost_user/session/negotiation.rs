//! Features, protocol features, device status, and reset.

use tracing::debug;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_RO;
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{RequestError, Session};

/// VHOST_F_LOG_ALL: the device logs the pages that it writes.
const FEATURE_LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES: SET_VRING_ENABLE says which rings are enabled.
const FEATURE_PROTOCOL_FEATURES: u64 = 1 << 30;
/// The features of the device type (VIRTIO 1.2, 2.2).
const DEVICE_FEATURES: u64 = 0xff_ffff;
/// Features that a driver must not use if the device does not offer them: those of the device type, on which the driver
/// relies, and those that change its rings. The session ignores others, which is harmless. QEMU accepts some features
/// in the guest's name without asking the back-end about them (VIRTIO_F_ANY_LAYOUT, for example).
///
/// The session also tolerates a driver that uses features that it did not accept, where that costs nothing, as QEMU and
/// SPDK do:
/// - VIRTIO_F_VERSION_1. Without it the driver has the legacy interface: SeaBIOS on `disable-modern=on`, old guests.
///   For this device that interface differs in the byte order, which is the guest's own. It is little-endian, as on the
///   hosts that ringpass runs on; a front-end with another guest asks for VHOST_USER_PROTOCOL_F_CROSS_ENDIAN, which
///   this back-end does not offer.
/// - VIRTIO_RING_F_INDIRECT_DESC. See `virtqueue/chain.rs`.
/// - VIRTIO_BLK_F_MQ. Queues beyond the first work like the first, and front-ends start all queues, regardless of what
///   the driver accepted.
/// - VIRTIO_BLK_F_BLK_SIZE, _SIZE_MAX, _SEG_MAX, _TOPOLOGY only announce limits, which hold in any case.
const FEATURES_NOT_TO_IGNORE: u64 = DEVICE_FEATURES
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_F_ACCESS_PLATFORM
    | 1 << VIRTIO_F_RING_PACKED
    | 1 << VIRTIO_F_IN_ORDER;

/// The protocol features: exactly those that are implemented, because QEMU accepts every feature that it finds here.
pub(super) const OFFERED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::STATUS);

/// The result of the negotiation.
#[derive(Debug)]
pub(super) struct Negotiation {
    protocol_features: VhostUserProtocolFeatures,
    /// VIRTIO features of the driver. `None`: the front-end has not sent them.
    driver_features: Option<u64>,
    /// The front-end accepted VHOST_USER_F_PROTOCOL_FEATURES.
    has_protocol_features: bool,
    /// The device status (VIRTIO 1.2, 2.1).
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

    /// The driver's features for a ring that starts. A driver whose front-end has sent none has accepted none.
    pub(super) fn driver_features(&self) -> u64 {
        self.driver_features.unwrap_or(0)
    }

    pub(super) fn has_driver_features(&self) -> bool {
        self.driver_features.is_some()
    }

    /// Whether rings are enabled before the first SET_VRING_ENABLE.
    pub(super) fn are_rings_enabled_at_first(&self) -> bool {
        !self.has_protocol_features
    }
}

impl Session<'_> {
    pub(super) fn offered_features(&self) -> u64 {
        self.device.device_features() | FEATURE_LOG_ALL | FEATURE_PROTOCOL_FEATURES
    }

    /// The options with which to start a server for a driver that accepted these features.
    fn as_it_was(&self, features: u64) -> &'static str {
        let read_only = 1 << VIRTIO_BLK_F_RO;
        match (features & read_only != 0, self.offered_features() & read_only != 0) {
            (true, false) => "with --read-only",
            // A read-only disk has neither discard nor write zeroes.
            (false, true) => "without --read-only",
            _ => "with the former disk, file system and --direct-io",
        }
    }

    /// Also turns logging on and off while rings run: QEMU waits for the reply and then relies on the change.
    pub(super) fn set_features(&mut self, features: u64) -> Result<(), RequestError> {
        let unoffered = features & !self.offered_features();
        if unoffered & FEATURES_NOT_TO_IGNORE != 0 {
            let bits = unoffered & FEATURES_NOT_TO_IGNORE;
            return Err(RequestError::UnofferedFeatures { bits, as_it_was: self.as_it_was(features) });
        }
        if unoffered != 0 {
            debug!(bits = format_args!("{unoffered:#x}"), "features ignored: they were not offered and are harmless");
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

    /// Stops rings that are started but disabled: Cloud Hypervisor resets a device by disabling its rings, and the next
    /// driver's set-up follows.
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

    /// A driver whose ring starts has accepted its features. If the front-end has not sent any in this session, the
    /// driver has none, regardless of what an earlier front-end sent.
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
    /// migration. The memory, the in-flight region and the eventfds stay, because QEMU counts on them.
    ///
    /// What the driver wrote to the configuration space also stays. QEMU keeps a copy of it, shows that copy to the
    /// guest across `stop` and resets, and does not write it again. A device that went back to a write-back cache would
    /// lose writes that the guest takes for stable.
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

    /// Forgets everything that a driver has set up. The memory table, the channel and the protocol features belong to
    /// the front-end and stay.
    pub(super) fn reset_device(&mut self) -> Result<(), RequestError> {
        self.set_status(0)?;
        self.set_log_all(false);
        self.inflight = None;
        self.vrings.iter_mut().for_each(super::Vring::reset);
        Ok(())
    }
}
