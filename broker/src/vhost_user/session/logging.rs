//! The dirty log for live migration.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tracing::{info, warn};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::{RequestError, Session};
use crate::virtqueue::DirtyLog;

/// Whether and where pages are logged.
///
/// QEMU turns logging on in one order while rings run (SET_LOG_BASE, SET_FEATURES) and in another when it starts a
/// device during a migration: SET_FEATURES with VHOST_F_LOG_ALL, the rings, and SET_LOG_BASE last. In between, rings
/// are held: a page that was written and not logged would be lost.
#[derive(Debug, Default)]
pub(super) struct Logging {
    /// VHOST_F_LOG_ALL was accepted.
    is_wanted: bool,
    log: Option<Arc<DirtyLog>>,
    /// The device has been given the log.
    is_in_force: bool,
}

impl Session<'_> {
    /// Turns logging on or off. In force when this returns.
    pub(super) fn set_log_all(&mut self, is_wanted: bool) {
        if is_wanted && !self.negotiation.has(VhostUserProtocolFeatures::LOG_SHMFD) {
            warn!("VHOST_F_LOG_ALL without VHOST_USER_PROTOCOL_F_LOG_SHMFD: there is no log, nothing is logged");
        }
        if is_wanted != self.logging.is_wanted {
            info!(is_wanted, "logging of dirty pages");
        }
        self.logging.is_wanted = is_wanted;
        if is_wanted {
            self.set_log(self.logging.log.clone());
        } else {
            self.forget_log();
        }
        self.apply_enabled_to_all();
    }

    /// Takes a log, also in exchange for the one in force: then every later page is in the new one. Gives the body of the
    /// reply, which is the description again (rust-vmm's front-ends check its size).
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

    /// Whether rings must not run because their pages could not be logged.
    pub(super) fn are_rings_held(&self) -> bool {
        self.logging.is_wanted
            && self.logging.log.is_none()
            && self.negotiation.has(VhostUserProtocolFeatures::LOG_SHMFD)
    }

    /// After the last ring has stopped, QEMU frees the log and says nothing: what comes next is a new one.
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
