//! The channel for messages to the front-end (VHOST_USER_SET_BACKEND_REQ_FD).

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use tracing::{debug, warn};
use vhost::vhost_user::message::BackendReq;

use super::connection::send_some;
use super::message::VERSION;

/// The channel. Nothing is ever read from it: no message that is sent asks for a reply.
#[derive(Debug)]
pub(super) struct BackendChannel {
    stream: UnixStream,
}

impl BackendChannel {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { stream: UnixStream::from(fd) }
    }

    /// Tells the front-end to read the configuration space again. Never waits: a front-end that does not read its
    /// messages only misses this one.
    pub(super) fn config_changed(&self) {
        let header = [BackendReq::CONFIG_CHANGE_MSG.into(), VERSION, 0_u32];
        let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        match send_some(&self.stream, &bytes, &[]) {
            Ok(sent_bytes) if sent_bytes == bytes.len() => debug!("told the front-end that the configuration changed"),
            Ok(sent_bytes) => warn!(sent_bytes, "only a part of the configuration change message could be sent"),
            Err(errno) => warn!(%errno, "could not tell the front-end that the configuration changed"),
        }
    }
}
