//! Replies to the front-end.

use std::os::fd::OwnedFd;

use super::{FLAG_REPLY, VERSION};

/// A reply, ready to be written.
#[derive(Debug)]
pub struct Reply {
    /// Number of the request that this reply answers.
    pub request: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// A file descriptor that goes with the reply.
    pub fd: Option<OwnedFd>,
}

impl Reply {
    /// A reply of one number: the value that the front-end asked for, or 0 for success and another number for failure.
    pub fn number(request: u32, number: u64) -> Self {
        Self { request, body: number.to_ne_bytes().to_vec(), fd: None }
    }

    /// Header and body. The flags are exactly version and reply bit: QEMU compares them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let size_bytes = self.body.len() as u32;
        let header = [self.request, VERSION | FLAG_REPLY, size_bytes];
        header.iter().flat_map(|word| word.to_ne_bytes()).chain(self.body.iter().copied()).collect()
    }
}
