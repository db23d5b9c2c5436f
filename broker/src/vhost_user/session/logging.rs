//! The dirty log for live migration.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tracing::{info, warn};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::{RequestError, Session};
use crate::virtqueue::DirtyLog;

/// Whether and where the device logs pages.
///
/// QEMU uses one order of messages to turn logging on while rings run (SET_LOG_BASE, SET_FEATURES) and another when it
/// starts a device during a migration: SET_FEATURES with VHOST_F_LOG_ALL, the rings, and SET_LOG_BASE last. In between,
/// the session holds the rings, because pages that are written and not logged would be lost.
#[derive(Debug, Default)]
pub(super) struct Logging {
    /// The front-end accepted VHOST_F_LOG_ALL.
    is_wanted: bool,
    log: Option<Arc<DirtyLog>>,
    /// The device has the log.
    is_in_force: bool,
}

impl Session<'_> {
    /// Turns logging on or off. The change is in force when this returns.
    pub(super) fn set_log_all(&mut self, is_wanted: bool) {
        if is_wanted && !self.negotiation.has(VhostUserProtocolFeatures::LOG_SHMFD) {
            warn!("nothing is logged: VHOST_F_LOG_ALL without VHOST_USER_PROTOCOL_F_LOG_SHMFD, so there is no log");
        }
        if is_wanted != self.logging.is_wanted {
            info!(is_wanted, "logging of dirty pages switched");
        }
        self.logging.is_wanted = is_wanted;
        if is_wanted {
            self.set_log(self.logging.log.clone());
        } else {
            self.forget_log();
        }
        self.apply_enabled_to_all();
    }

    /// Takes a log, possibly in exchange for the one in force: then the device marks every later page in the new log.
    /// Returns the body of the reply, which repeats the description (rust-vmm's front-ends check its size).
    pub(super) fn set_log_base(
        &mut self,
        size_bytes: u64,
        offset_bytes: u64,
        fd: Option<OwnedFd>,
    ) -> Result<Vec<u8>, RequestError> {
        self.negotiation.require(VhostUserProtocolFeatures::LOG_SHMFD, "LOG_SHMFD")?;
        if let Some(fd) = fd {
            let log = DirtyLog::from_fd(fd, offset_bytes, size_bytes).map_err(RequestError::Log)?;
            self.logging.log = Some(Arc::new(log));
            if self.logging.is_wanted {
                self.set_log(self.logging.log.clone());
                self.apply_enabled_to_all();
            }
        }
        Ok([size_bytes, offset_bytes].into_iter().flat_map(u64::to_ne_bytes).collect())
    }

    /// Whether rings must not run because the device could not log their pages.
    pub(super) fn are_rings_held(&self) -> bool {
        self.logging.is_wanted
            && self.logging.log.is_none()
            && self.negotiation.has(VhostUserProtocolFeatures::LOG_SHMFD)
    }

    /// After the last ring has stopped, QEMU frees the log without a message; later it sends a new one.
    pub(super) fn forget_log_if_all_stopped(&mut self) {
        if !self.vrings.iter().any(|vring| vring.is_started) {
            self.forget_log();
        }
    }

    fn forget_log(&mut self) {
        self.logging.log = None;
        self.set_log(None);
    }

    fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        if log.is_some() || self.logging.is_in_force {
            self.logging.is_in_force = log.is_some();
            self.device.set_dirty_log(log);
        }
    }
}
