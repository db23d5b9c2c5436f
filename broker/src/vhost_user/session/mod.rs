//! The session with one front-end: the state that its messages build, and what they make the device do.
//!
//! A request is checked completely before anything changes. What the front-end may get wrong without harm is tolerated
//! where known front-ends do so, and the place says which.

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
use crate::log_limit::{Cause, LogLimits};
use crate::virtqueue::InflightRegion;

/// What became of a request that is not refused.
enum Answer {
    /// It is carried out, and has no reply of its own.
    Done,
    /// The body of its own reply, and a descriptor that goes with it.
    Reply(Vec<u8>, Option<OwnedFd>),
    /// The guest's driver asked for it, and the front-end passed that on. VMMs (QEMU, Cloud Hypervisor, crosvm) print an error
    /// when they are told, and go on.
    RefusedToDriver(ConfigWriteError),
}

/// What a request that is refused is answered with, whether an acknowledgement is asked for or not.
enum OwnReply {
    /// The request has no reply of its own.
    None,
    /// The reply has a value for "no", in this body.
    Refusal(Vec<u8>),
    /// The reply has no value for "no": a front-end that got one would go on with a wrong answer.
    CannotRefuse,
}

/// The session with one front-end, from connection to disconnection.
///
/// When it is dropped, the device learns that the front-end is gone.
pub struct Session<'d> {
    device: &'d mut dyn Device,
    negotiation: Negotiation,
    memory: MemoryTable,
    vrings: Vec<Vring>,
    inflight: Option<InflightRegion>,
    logging: Logging,
    channel: Option<BackendChannel>,
    /// The front-end is to be told that the configuration has changed, once its device runs.
    is_announcement_due: bool,
    /// The driver before had set something that this one has to set again, unless the in-flight region says so.
    has_forgotten_settings: bool,
    last_request: Option<u32>,
    /// A guest causes some of them at will, and a front-end the others.
    refusals: LogLimits,
}

impl<'d> Session<'d> {
    /// A session in which nothing was said yet.
    pub fn new(device: &'d mut dyn Device) -> Self {
        // What an earlier front-end had under way was logged for it until now: it may have come back.
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

    /// Does what a message says. Gives the reply to send, if it has one.
    ///
    /// # Errors
    ///
    /// The connection must end: the message is none, or a request is refused and the front-end cannot be told.
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
                    warn!(request = request_name(request), %error, total, "the driver's request is refused");
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

    /// Tells the front-end that the configuration space has changed, if it can be told.
    pub fn notify_config_change(&self) {
        match &self.channel {
            Some(channel) if self.negotiation.has(VhostUserProtocolFeatures::CONFIG) => channel.config_changed(),
            _ => debug!("the front-end cannot be told that the configuration changed"),
        }
        self.keep_record();
    }

    /// What the server should say of a front-end that has left just now.
    pub fn farewell(&self) -> Option<String> {
        let queues = self.vrings.len();
        (self.last_request == Some(FrontendReq::GET_QUEUE_NUM.into())).then(|| {
            format!(
                "it left on learning that the device has {queues} queues; a front-end that needs more queues does so each time it \
                 reconnects: start the server with as many as before (--num-queues)"
            )
        })
    }

    /// Asks the device for the capacity again, and tells the front-end if it changed.
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
            // An eventfd to be signalled for each mark in the log. QEMU does not send it and nobody needs it.
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

    /// The front-end begins: as a rule on a new connection, which has nothing yet. QEMU also begins again on an old one,
    /// when the device was unplugged and is plugged in again; it has then forgotten the memory that it had shared.
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

    /// Vrings that run keep the guest addresses they were started with.
    fn set_memory(&mut self, table: MemoryTable) {
        self.device.set_memory(table.memory());
        self.memory = table;
    }
}

/// The cause for the limits of log lines: what is wrong with which request. All unknown requests are one.
fn cause(request: u32, wrong: impl Hash) -> Cause {
    let known = FrontendReq::try_from(request).is_ok().then_some(request);
    Cause::new((known, wrong))
}

/// Asks the device for its capacity again. True: it has changed.
pub(super) fn refresh_capacity(device: &mut dyn Device) -> bool {
    match device.refresh_capacity() {
        Ok(is_other) => is_other,
        Err(error) => {
            warn!(error, "the disk keeps its size");
            false
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.device.abandon();
        // The memory of a guest that is gone must not stay allocated because it is mapped here. What is under way keeps
        // it until it ends, and is logged until then: a guest that migrates may have lost no more than its connection.
        self.set_memory(MemoryTable::default());
    }
}

fn number(number: u64) -> Result<Answer, RequestError> {
    Ok(Answer::Reply(number.to_ne_bytes().to_vec(), None))
}

/// How a request is answered whether the front-end sets the flag or not.
fn own_reply(request: &Request) -> OwnReply {
    match *request {
        // The specification, VHOST_USER_GET_CONFIG: a payload of length zero is an error. QEMU and the vhost crate take it so.
        Request::GetConfig { offset_bytes, flags, .. } => {
            OwnReply::Refusal([offset_bytes, 0, flags].into_iter().flat_map(u32::to_ne_bytes).collect())
        }
        // A region of no bytes. QEMU goes on without one; the vhost crate misses the descriptor.
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
