//! Messages of the front-end, as bytes and as checked requests.
//!
//! [`Header::parse`] and [`Request::parse`] are pure: they decide what a front-end may write on the socket from the
//! bytes and the number of file descriptors alone. They do not know the session, which decides whether a request makes
//! sense at its time.
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
/// The longest body that the back-end reads. The longest useful one is a table of 253 memory regions.
pub const MAX_BODY_BYTES: usize = 8192;
/// The maximum number of file descriptors in one message (SCM_MAX_FD of Linux).
pub const MAX_FDS: usize = 253;

/// Bits 0 and 1 of the flags: the version of the protocol.
const FLAG_VERSION_MASK: u32 = 0b0011;
pub(super) const VERSION: u32 = 1;
/// Bit 2 of the flags: the message is a reply.
const FLAG_REPLY: u32 = 0b0100;
/// Bit 3 of the flags: the front-end wants to know whether the request succeeded.
const FLAG_NEED_REPLY: u32 = 0b1000;

/// Why bytes are not a valid request. After most of these errors the back-end cannot trust the stream;
/// [`is_request`](Self::is_request) names the exceptions.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MessageError {
    /// Bits 0 and 1 of the flags are wrong.
    #[error("message {request}: version {version} of vhost-user; only version {VERSION} exists")]
    Version {
        /// Number of the request.
        request: u32,
        /// The version in its flags.
        version: u32,
    },
    /// The front-end sent a reply although the back-end asked for none.
    #[error("message {request} is marked as a reply, but the back-end has asked for none")]
    UnexpectedReply {
        /// Number of the request.
        request: u32,
    },
    /// The flags have bits without a meaning.
    #[error("message {request}: flags {flags:#x} have unknown bits")]
    UnknownFlags {
        /// Number of the request.
        request: u32,
        /// Its flags.
        flags: u32,
    },
    /// The body is longer than any request needs.
    #[error("message {request} announces {size_bytes} bytes; the back-end reads at most {MAX_BODY_BYTES}")]
    TooLong {
        /// Number of the request.
        request: u32,
        /// Size of its body.
        size_bytes: u32,
    },
    /// The body does not have the size of this request.
    #[error("a body of {size_bytes} bytes instead of {expected}")]
    BodySize {
        /// The request.
        request: FrontendReq,
        /// Size of its body.
        size_bytes: usize,
        /// The size that it should have.
        expected: &'static str,
    },
    /// The request comes with too many or too few file descriptors.
    #[error("{fds} file descriptors instead of {expected}")]
    FdCount {
        /// The request.
        request: FrontendReq,
        /// How many descriptors came.
        fds: usize,
        /// How many descriptors should have come.
        expected: usize,
    },
    /// A field has a value that is never valid.
    #[error("invalid value {value:#x} of {field}")]
    BadField {
        /// The request.
        request: FrontendReq,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// No version of the specification has this request, or this device does not implement it.
    #[error("not implemented")]
    Unimplemented {
        /// Number of the request.
        request: u32,
    },
}

impl MessageError {
    /// Whether the message is whole and only its content makes no sense. The back-end can then answer it with an error,
    /// and can trust the messages behind it.
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
    /// Number of the request; the request need not exist.
    pub request: u32,
    /// The front-end asks for a reply even if the request has none. This only counts after
    /// VHOST_USER_PROTOCOL_F_REPLY_ACK was negotiated.
    pub needs_reply: bool,
    /// Size of the body that follows, at most [`MAX_BODY_BYTES`].
    pub body_bytes: usize,
}

impl Header {
    /// Parses a header.
    ///
    /// # Errors
    ///
    /// Version, flags or size are invalid, so nothing after the header can be understood.
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
