//! The channel for messages to the front-end (VHOST_USER_SET_BACKEND_REQ_FD).

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use tracing::{debug, warn};
use vhost::vhost_user::message::BackendReq;

use super::connection::send_some;
use super::message::VERSION;

/// The channel. The back-end never reads from it, because no message that it sends asks for a reply.
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
            Ok(sent_bytes) => warn!(
                sent_bytes,
                message_bytes = bytes.len(),
                "configuration change message truncated: the front-end does not read its back-end channel"
            ),
            Err(errno) => warn!(%errno, "configuration change message not sent: the front-end's channel refused it"),
        }
    }
}
