//! Messages of the front-end, as bytes and as checked requests.
//!
//! [`Header::parse`] and [`Request::parse`] are pure: what a front-end may write on the socket is decided here, from
//! the bytes and the number of file descriptors alone. They know nothing of the session; whether a request makes sense
//! at its time is for the session.
//!
//! Layout and sizes are those of the vhost-user specification, chapter "Message Specification". All numbers are in the
//! byte order of the machine.

mod body;
mod reply;
mod request;
#[cfg(test)]
mod tests;

use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;

pub use reply::Reply;
pub use request::{InflightDescription, RegionDescription, Request, VringAddress, VringFile};

/// Size of a message's header.
pub const HEADER_BYTES: usize = 12;
/// The longest body that is read. The longest that has a use is a table of 253 memory regions.
pub const MAX_BODY_BYTES: usize = 8192;
/// The most file descriptors that one message can carry (SCM_MAX_FD of Linux).
pub const MAX_FDS: usize = 253;

/// Bits 0 and 1 of the flags: the version of the protocol.
const FLAG_VERSION_MASK: u32 = 0b0011;
pub(super) const VERSION: u32 = 1;
/// Bit 2 of the flags: the message is a reply.
const FLAG_REPLY: u32 = 0b0100;
/// Bit 3 of the flags: the front-end wants to know whether the request succeeded.
const FLAG_NEED_REPLY: u32 = 0b1000;

/// Why bytes are no request. After most of these the stream cannot be trusted; [`is_request`](Self::is_request) has the
/// exceptions.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MessageError {
    /// Bits 0 and 1 of the flags.
    #[error("message {request}: version {version} of vhost-user, only {VERSION} exists")]
    Version {
        /// Number of the request.
        request: u32,
        /// The version in its flags.
        version: u32,
    },
    /// A front-end that replies although it was not asked.
    #[error("message {request} is marked as a reply, which a front-end does not send here")]
    UnexpectedReply {
        /// Number of the request.
        request: u32,
    },
    /// Bits that have no meaning.
    #[error("message {request}: flags {flags:#x} have unknown bits")]
    UnknownFlags {
        /// Number of the request.
        request: u32,
        /// Its flags.
        flags: u32,
    },
    /// More than any request needs.
    #[error("message {request} announces {size_bytes} bytes; the longest that is read has {MAX_BODY_BYTES}")]
    TooLong {
        /// Number of the request.
        request: u32,
        /// Size of its body.
        size_bytes: u32,
    },
    /// The body has not the size that the request has.
    #[error("a body of {size_bytes} bytes instead of {expected}")]
    BodySize {
        /// The request.
        request: FrontendReq,
        /// Size of its body.
        size_bytes: usize,
        /// What it should have been.
        expected: &'static str,
    },
    /// The request comes with too many or too few file descriptors.
    #[error("{fds} file descriptors instead of {expected}")]
    FdCount {
        /// The request.
        request: FrontendReq,
        /// How many there were.
        fds: usize,
        /// How many there should have been.
        expected: usize,
    },
    /// A field has a value that it cannot have at any time.
    #[error("{field} is {value:#x}")]
    BadField {
        /// The request.
        request: FrontendReq,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A request that no version of the specification has, or one that this device does not implement.
    #[error("not implemented")]
    Unimplemented {
        /// Number of the request.
        request: u32,
    },
}

impl MessageError {
    /// Whether the message is whole and only asks for something that makes no sense: the front-end can be told, and the
    /// messages behind it mean what they say.
    pub fn is_request(&self) -> bool {
        match self {
            Self::BadField { .. } | Self::Unimplemented { .. } => true,
            Self::Version { .. }
            | Self::UnexpectedReply { .. }
            | Self::UnknownFlags { .. }
            | Self::TooLong { .. }
            | Self::BodySize { .. }
            | Self::FdCount { .. } => false,
        }
    }
}

/// The checked header of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Number of the request; not necessarily one that exists.
    pub request: u32,
    /// The front-end asks for a reply also where the request has none. It only counts after
    /// VHOST_USER_PROTOCOL_F_REPLY_ACK was negotiated.
    pub needs_reply: bool,
    /// Size of the body that follows, at most [`MAX_BODY_BYTES`].
    pub body_bytes: usize,
}

impl Header {
    /// Takes a header apart.
    ///
    /// # Errors
    ///
    /// Version, flags or size are impossible: nothing after it can be understood.
    pub fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Self, MessageError> {
        let [request, flags, size_bytes] = words(bytes);
        let version = flags & FLAG_VERSION_MASK;
        if version != VERSION {
            return Err(MessageError::Version { request, version });
        }
        if flags & FLAG_REPLY != 0 {
            return Err(MessageError::UnexpectedReply { request });
        }
        if flags & !(FLAG_VERSION_MASK | FLAG_NEED_REPLY) != 0 {
            return Err(MessageError::UnknownFlags { request, flags });
        }
        match usize::try_from(size_bytes) {
            Ok(body_bytes) if body_bytes <= MAX_BODY_BYTES => {
                Ok(Self { request, needs_reply: flags & FLAG_NEED_REPLY != 0, body_bytes })
            }
            _ => Err(MessageError::TooLong { request, size_bytes }),
        }
    }
}

fn words(bytes: [u8; HEADER_BYTES]) -> [u32; 3] {
    let [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3] = bytes;
    [[a0, a1, a2, a3], [b0, b1, b2, b3], [c0, c1, c2, c3]].map(u32::from_ne_bytes)
}
