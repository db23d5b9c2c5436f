//! The in-flight region: what the front-end keeps for the next process of the server.
//!
//! Besides the requests under way it keeps what the driver has set, and what the guest was told of the device.

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

    /// Keeps what the driver was told and has accepted, for the next process. Not before it has accepted features in this session, and
    /// not before it was told what has changed: until then what an earlier process recorded counts.
    pub(super) fn keep_record(&self) {
        if let Some(region) = &self.inflight
            && self.negotiation.has_driver_features()
            && !self.is_announcement_due
        {
            region.set_device_record(&self.device.record());
        }
    }

    /// Not earlier: QEMU looks at a changed configuration only while its device runs, and until 8.0 it would take the answer to its
    /// question for that to another request, for which it waits while the device starts.
    pub(super) fn announce_if_due(&mut self, is_running: bool) {
        if is_running && std::mem::take(&mut self.is_announcement_due) {
            info!("the disk has grown since the guest heard of its size: it is told");
            self.notify_config_change();
        }
    }

    /// Makes a region. It is used when the front-end gives it back, which some never do.
    pub(super) fn get_inflight_fd(
        &self,
        asked: InflightDescription,
    ) -> Result<(Vec<u8>, Option<OwnedFd>), RequestError> {
        self.check_inflight(&asked)?;
        let file = InflightRegion::create(asked.queues, asked.queue_size)?;
        let made = InflightDescription { size_bytes: file.size_bytes, offset_bytes: 0, ..asked };
        Ok((made.to_bytes(), Some(file.fd)))
    }

    /// Counts for vrings that start from now on. What the driver had set is taken up at once: a region that an earlier
    /// process used comes before the vrings whose requests depend on it.
    ///
    /// A guest that was told of another device gets nothing executed: the session ends, and the front-end can come again.
    pub(super) fn set_inflight_fd(
        &mut self,
        given: InflightDescription,
        fd: Option<OwnedFd>,
    ) -> Result<(), RequestError> {
        let Some(fd) = fd else { return self.check_inflight(&given) };
        self.negotiation.require(VhostUserProtocolFeatures::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
        let InflightDescription { size_bytes, offset_bytes, queues, queue_size, .. } = given;
        let region = InflightRegion::from_fd(fd, offset_bytes, size_bytes, queues, queue_size)?;
        // First: it says more than that the region is one for more queues.
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
