//! The session with one front-end: the state that its messages build, and the calls that they cause to the device.
//!
//! The session checks a request completely before it changes anything. It tolerates harmless mistakes that known
//! front-ends make, and a comment at each such place names the front-end.

mod config;
mod error;
mod inflight;
mod logging;
mod negotiation;
mod rings;
#[cfg(test)]
mod tests;
mod vring;

use std::hash::Hash;
use std::mem::discriminant;
use std::os::fd::OwnedFd;

use tracing::{debug, warn};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;

use self::error::request_name;
pub use self::error::{RequestError, SessionError};
use self::logging::Logging;
use self::negotiation::Negotiation;
use self::vring::Vring;
use super::backend_channel::BackendChannel;
use super::connection::Message;
use super::device::{ConfigWriteError, Device};
use super::memory_table::{MAX_REGIONS, MemoryTable};
use super::message::{InflightDescription, RegionDescription, Reply, Request};
use crate::log_limit::{LogCause, LogLimits};
use crate::virtqueue::InflightRegion;

/// The outcome of a request that the session does not refuse.
enum Answer {
    /// The session has carried it out, and it has no reply of its own.
    Done,
    /// The body of the request's own reply, and a descriptor that goes with it.
    Reply(Vec<u8>, Option<OwnedFd>),
    /// The device refused a request of the guest's driver that the front-end passed on. VMMs (QEMU, Cloud Hypervisor,
    /// crosvm) print an error when the back-end reports it, and go on.
    RefusedToDriver(ConfigWriteError),
}

/// The reply to a refused request, regardless of whether the front-end asks for an acknowledgement.
enum OwnReply {
    /// The request has no reply of its own.
    None,
    /// The reply can express a refusal, with this body.
    Refusal(Vec<u8>),
    /// The reply cannot express a refusal: the front-end would go on with a wrong answer.
    CannotRefuse,
}

/// The session with one front-end, from connection to disconnection.
///
/// Dropping the session tells the device that the front-end is gone.
pub struct Session<'d> {
    device: &'d mut dyn Device,
    negotiation: Negotiation,
    memory: MemoryTable,
    vrings: Vec<Vring>,
    inflight: Option<InflightRegion>,
    logging: Logging,
    channel: Option<BackendChannel>,
    /// The session must tell the front-end that the configuration has changed, once its device runs.
    is_announcement_due: bool,
    /// A previous driver had settings that this one has to make again, unless the in-flight region has them.
    has_forgotten_settings: bool,
    last_request: Option<u32>,
    /// Limits the log lines about refusals, which a guest or a front-end can cause at any rate.
    refusals: LogLimits,
}

impl<'d> Session<'d> {
    /// A session before the first message.
    pub fn new(device: &'d mut dyn Device) -> Self {
        // Until now the device logged the requests of an earlier front-end for it, because that front-end may come
        // back.
        device.set_dirty_log(None);
        let has_forgotten_settings = device.driver_settings() != 0;
        device.forget_driver();
        let vrings = (0..device.queue_count()).map(|_| Vring::default()).collect();
        Self {
            device,
            negotiation: Negotiation::default(),
            memory: MemoryTable::default(),
            vrings,
            inflight: None,
            logging: Logging::default(),
            channel: None,
            is_announcement_due: false,
            has_forgotten_settings,
            last_request: None,
            refusals: LogLimits::new(),
        }
    }

    /// Handles a message. Returns the reply to send, if there is one.
    ///
    /// # Errors
    ///
    /// The connection must end: the message is malformed, or the session refuses a request and cannot tell the
    /// front-end.
    pub fn handle(&mut self, message: Message) -> Result<Option<Reply>, SessionError> {
        let Message { header, body, fds } = message;
        let request = header.request;
        self.last_request = Some(request);
        let parsed = Request::parse(request, &body, fds.len()).map_err(RequestError::from);
        let own_reply = parsed.as_ref().map_or(OwnReply::None, own_reply);
        debug!(request = request_name(request), fds = fds.len(), ?parsed, "message");
        let outcome = parsed.and_then(|parsed| self.execute(parsed, fds));
        let is_ack_wanted = header.needs_reply && self.negotiation.has(VhostUserProtocolFeatures::REPLY_ACK);
        let error = match outcome {
            Ok(Answer::Reply(body, fd)) => return Ok(Some(Reply { request, body, fd })),
            Ok(Answer::Done) => return Ok(is_ack_wanted.then(|| Reply::number(request, 0))),
            Ok(Answer::RefusedToDriver(error)) => {
                if let Some(total) = self.refusals.count(cause(request, discriminant(&error))) {
                    warn!(request = request_name(request), %error, total, "driver's request refused");
                }
                return Ok(is_ack_wanted.then(|| Reply::number(request, 1)));
            }
            Err(error) => error,
        };
        let refusal = match own_reply {
            _ if !error.is_answerable() => None,
            OwnReply::None => is_ack_wanted.then(|| Reply::number(request, 1)),
            OwnReply::Refusal(body) => Some(Reply { request, body, fd: None }),
            OwnReply::CannotRefuse => None,
        };
        if refusal.is_none() {
            return Err(SessionError { request, source: error });
        }
        if let Some(total) = self.refusals.count(cause(request, error.cause())) {
            warn!(request = request_name(request), %error, total, "request refused");
        }
        Ok(refusal)
    }

    /// Tells the front-end that the configuration space has changed, if the front-end has a channel for it.
    pub fn notify_config_change(&self) {
        match &self.channel {
            Some(channel) if self.negotiation.has(VhostUserProtocolFeatures::CONFIG) => channel.config_changed(),
            _ => debug!("configuration change not announced: the front-end has no channel for it"),
        }
        self.keep_record();
    }

    /// Why a front-end that has just left may have done so, for a line in the log.
    pub fn departure_hint(&self) -> Option<String> {
        let queues = self.vrings.len();
        (self.last_request == Some(FrontendReq::GET_QUEUE_NUM.into())).then(|| {
            format!(
                "it left on learning that the device has {queues} queues; a front-end that needs more queues does so \
                 each time it connects (start the server with as many as before: --num-queues)"
            )
        })
    }

    /// Makes the device read its capacity again, and tells the front-end if it changed.
    pub fn refresh_capacity(&mut self) {
        if refresh_capacity(self.device) {
            self.notify_config_change();
        }
    }

    fn execute(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Answer, RequestError> {
        use VhostUserProtocolFeatures as Feature;
        let mut fds = fds.into_iter();
        match request {
            Request::GetFeatures => return number(self.offered_features()),
            Request::SetFeatures { features } => self.set_features(features)?,
            Request::GetProtocolFeatures => return number(negotiation::OFFERED.bits()),
            Request::SetProtocolFeatures { features } => self.set_protocol_features(features)?,
            Request::SetOwner => self.begin(),
            Request::ResetOwner => self.disable_all(),
            Request::ResetDevice => {
                self.negotiation.require(Feature::RESET_DEVICE, "RESET_DEVICE")?;
                self.reset_device()?;
            }
            Request::SetStatus { status } => {
                self.negotiation.require(Feature::STATUS, "STATUS")?;
                self.set_status(status)?;
                self.announce_if_due(u32::from(status) & VIRTIO_CONFIG_S_DRIVER_OK != 0);
            }
            Request::GetStatus => {
                self.negotiation.require(Feature::STATUS, "STATUS")?;
                return number(self.negotiation.status.into());
            }
            Request::GetQueueNum => {
                self.negotiation.require(Feature::MQ, "MQ")?;
                return number(self.vrings.len() as u64);
            }
            Request::SetBackendReqFd => {
                self.negotiation.require(Feature::BACKEND_REQ, "BACKEND_REQ")?;
                self.channel = fds.next().map(BackendChannel::new);
            }

            Request::GetMaxMemSlots => {
                self.negotiation.require(Feature::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")?;
                return number(MAX_REGIONS as u64);
            }
            Request::SetMemTable { regions } => self.set_memory(self.memory.replaced(regions.into_iter().zip(fds))?),
            Request::AddMemReg(region) => self.add_region(region, fds.next())?,
            Request::RemMemReg(region) => {
                self.negotiation.require(Feature::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")?;
                self.set_memory(self.memory.without(&region)?);
            }

            Request::SetVringNum { index, size } => self.set_vring_num(index, size)?,
            Request::SetVringAddr(address) => self.set_vring_addr(address)?,
            Request::SetVringBase { index, next_avail } => self.set_vring_base(index, next_avail)?,
            Request::SetVringKick(file) => self.set_vring_kick(file.index, fds.next())?,
            Request::SetVringCall(file) => self.set_vring_call(file.index, fds.next())?,
            Request::SetVringErr(file) => self.set_vring_err(file.index, fds.next())?,
            Request::SetVringEnable { index, is_enabled } => {
                self.set_vring_enable(index, is_enabled)?;
                self.announce_if_due(is_enabled && !self.negotiation.has(Feature::STATUS));
            }
            Request::GetVringBase { index } => return self.get_vring_base(index).map(|body| Answer::Reply(body, None)),

            Request::SetLogBase { size_bytes, offset_bytes } => {
                return self.set_log_base(size_bytes, offset_bytes, fds.next()).map(|body| Answer::Reply(body, None));
            }
            // An eventfd that the device could signal for each mark in the log. QEMU does not send it and no known
            // front-end needs it.
            Request::SetLogFd => {}

            Request::GetConfig { offset_bytes, size_bytes, flags } => {
                return self.get_config(offset_bytes, size_bytes, flags).map(|body| Answer::Reply(body, None));
            }
            Request::SetConfig { offset_bytes, flags, bytes } => return self.set_config(offset_bytes, flags, &bytes),

            Request::GetInflightFd(description) => {
                return self.get_inflight_fd(description).map(|(body, fd)| Answer::Reply(body, fd));
            }
            Request::SetInflightFd(description) => self.set_inflight_fd(description, fds.next())?,
        }
        Ok(Answer::Done)
    }

    /// Handles SET_OWNER. The front-end usually sends it on a new connection, which has no state yet. QEMU also sends
    /// it on an old connection when its user unplugs the device and plugs it in again; QEMU has then forgotten the
    /// memory that it had shared.
    fn begin(&mut self) {
        if !self.vrings.iter().any(|vring| vring.is_started) && !self.memory.is_empty() {
            self.set_memory(MemoryTable::default());
        }
    }

    fn add_region(&mut self, region: RegionDescription, fd: Option<OwnedFd>) -> Result<(), RequestError> {
        self.negotiation.require(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")?;
        if let Some(fd) = fd {
            self.set_memory(self.memory.with(region, fd)?);
        }
        Ok(())
    }

    /// Running vrings keep the guest addresses that they started with.
    fn set_memory(&mut self, table: MemoryTable) {
        self.device.set_memory(table.memory());
        self.memory = table;
    }
}

/// The cause for rate limits of log lines: what is wrong with which request. All unknown requests count as one.
fn cause(request: u32, wrong: impl Hash) -> LogCause {
    let known = FrontendReq::try_from(request).is_ok().then_some(request);
    LogCause::new((known, wrong))
}

/// Makes the device read its capacity again. True: it has changed.
pub(super) fn refresh_capacity(device: &mut dyn Device) -> bool {
    match device.refresh_capacity() {
        Ok(is_other) => is_other,
        Err(error) => {
            warn!(error, "disk keeps its size: the new size cannot be used");
            false
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.device.abandon();
        // The memory of a gone guest must not stay allocated because this process maps it. Requests under way keep the
        // memory until they end, and the device logs them until then: a migrating guest may have lost only its
        // connection.
        self.set_memory(MemoryTable::default());
    }
}

fn number(number: u64) -> Result<Answer, RequestError> {
    Ok(Answer::Reply(number.to_ne_bytes().to_vec(), None))
}

/// The refusal of a request, regardless of whether the front-end asks for an acknowledgement.
fn own_reply(request: &Request) -> OwnReply {
    match *request {
        // The specification, VHOST_USER_GET_CONFIG: a payload of length zero is an error. QEMU and the vhost crate
        // treat it so.
        Request::GetConfig { offset_bytes, flags, .. } => {
            OwnReply::Refusal([offset_bytes, 0, flags].into_iter().flat_map(u32::to_ne_bytes).collect())
        }
        // A region of no bytes. QEMU goes on without a region; the vhost crate reports the missing descriptor.
        Request::GetInflightFd(asked) => {
            OwnReply::Refusal(InflightDescription { size_bytes: 0, offset_bytes: 0, ..asked }.to_bytes())
        }
        Request::GetFeatures
        | Request::GetProtocolFeatures
        | Request::GetQueueNum
        | Request::GetMaxMemSlots
        | Request::GetVringBase { .. }
        | Request::SetLogBase { .. }
        | Request::GetStatus => OwnReply::CannotRefuse,
        _ => OwnReply::None,
    }
}
