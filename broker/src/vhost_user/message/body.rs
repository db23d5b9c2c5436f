//! Reads the fields of a body one after another.

use vhost::vhost_user::message::FrontendReq;

use super::MessageError;

/// The unread fields of a body. The constructor has checked the size, so a missing field is a bug in this crate; it
/// reads as 0 instead of panicking.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// The fields of `body`, which must have `expected_bytes` bytes.
    pub(super) fn exactly(
        request: FrontendReq,
        body: &'a [u8],
        expected_bytes: usize,
        expected: &'static str,
    ) -> Result<Self, MessageError> {
        if body.len() == expected_bytes {
            Ok(Self { rest: body })
        } else {
            Err(MessageError::BodySize { request, size_bytes: body.len(), expected })
        }
    }

    /// The fields of `body`, whose total size the caller checks field by field.
    pub(super) fn at_least(
        request: FrontendReq,
        body: &'a [u8],
        least_bytes: usize,
        expected: &'static str,
    ) -> Result<Self, MessageError> {
        if body.len() >= least_bytes {
            Ok(Self { rest: body })
        } else {
            Err(MessageError::BodySize { request, size_bytes: body.len(), expected })
        }
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_ne_bytes(self.take())
    }

    /// The unread bytes.
    pub(super) fn rest(self) -> &'a [u8] {
        self.rest
    }

    fn take<const BYTES: usize>(&mut self) -> [u8; BYTES] {
        match self.rest.split_first_chunk() {
            Some((field, rest)) => {
                self.rest = rest;
                *field
            }
            None => [0; BYTES],
        }
    }
}
