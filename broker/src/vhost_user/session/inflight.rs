//! The in-flight region, which the front-end keeps for the next process of the server.
//!
//! Besides the requests under way the region holds the driver's settings, and what the guest was told of the device.

use std::os::fd::OwnedFd;

use tracing::info;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::super::message::InflightDescription;
use super::{RequestError, Session};
use crate::virtqueue::InflightRegion;

impl Session<'_> {
    pub(super) fn keep_driver_settings(&self) {
        if let Some(region) = &self.inflight {
            region.set_driver_settings(self.device.driver_settings());
        }
    }

    /// Records what the driver was told and has accepted, for the next process. Records nothing before the driver has
    /// accepted features in this session and the front-end has been told of changes: until then the record of an
    /// earlier process counts.
    pub(super) fn keep_record(&self) {
        let Some(region) = &self.inflight else { return };
        if self.negotiation.has_driver_features() && !self.is_announcement_due {
            region.set_device_record(&self.device.record());
        }
    }

    /// Tells the front-end of a changed configuration once its device runs, and not earlier. QEMU looks at a changed
    /// configuration only while its device runs. Up to 8.0, QEMU would also take the answer to its question for the
    /// answer to another request, for which it waits while the device starts.
    pub(super) fn announce_if_due(&mut self, is_running: bool) {
        if is_running && std::mem::take(&mut self.is_announcement_due) {
            info!("configuration change announced: the disk has grown since the guest last read its size");
            self.notify_config_change();
        }
    }

    /// Makes a region. The session uses it only when the front-end sends it back, which some front-ends never do.
    pub(super) fn get_inflight_fd(
        &self,
        asked: InflightDescription,
    ) -> Result<(Vec<u8>, Option<OwnedFd>), RequestError> {
        self.check_inflight(&asked)?;
        let file = InflightRegion::create(asked.queues, asked.queue_size)?;
        let made = InflightDescription { size_bytes: file.size_bytes, offset_bytes: 0, ..asked };
        Ok((made.to_bytes(), Some(file.fd)))
    }

    /// Sets the region for vrings that start from now on. Restores the driver's settings at once: a front-end sends a
    /// region of an earlier process before the vrings whose requests depend on the settings.
    ///
    /// If the guest was told of a different device, the session ends before anything is executed, and the front-end can
    /// connect again.
    pub(super) fn set_inflight_fd(
        &mut self,
        given: InflightDescription,
        fd: Option<OwnedFd>,
    ) -> Result<(), RequestError> {
        let Some(fd) = fd else { return self.check_inflight(&given) };
        self.negotiation.require(VhostUserProtocolFeatures::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
        let InflightDescription { size_bytes, offset_bytes, queues, queue_size, .. } = given;
        let region = InflightRegion::from_fd(fd, offset_bytes, size_bytes, queues, queue_size)?;
        // This check goes first, because its error says more than the error about the number of queues.
        let record = region.device_record();
        let is_news = record.map(|record| self.device.compare_record(&record, queues)).transpose();
        let is_news = is_news.map_err(RequestError::DeviceChanged)?.unwrap_or(false);
        self.check_inflight(&given)?;
        self.is_announcement_due |= is_news;
        self.device.restore_driver_settings(region.driver_settings());
        self.inflight = Some(region);
        self.keep_driver_settings();
        self.keep_record();
        Ok(())
    }

    fn check_inflight(&self, description: &InflightDescription) -> Result<(), RequestError> {
        self.negotiation.require(VhostUserProtocolFeatures::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
        let InflightDescription { queues, queue_size, .. } = *description;
        let (max_queues, max_queue_size) = (self.vrings.len(), self.device.max_queue_size());
        if usize::from(queues) > max_queues || queue_size > max_queue_size {
            return Err(RequestError::InflightShape { queues, queue_size, max_queues, max_queue_size });
        }
        Ok(())
    }
}
