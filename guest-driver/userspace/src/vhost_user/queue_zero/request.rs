//! The requests that queue 0 executes for the other parts of the driver, and their answers.

use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

use super::super::Error;
use super::super::requests::ANSWER_BYTES;

/// Length of the serial number in the answer to GET_ID.
const ID_BYTES: usize = 20;

/// A request that another part of the driver sends on queue 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum QueueZeroRequest {
    Flush,
    Discard {
        offset_bytes: u64,
        len_bytes: u64,
    },
    WriteZeroes {
        offset_bytes: u64,
        len_bytes: u64,
        unmap: bool,
    },
    GetId,
    /// A read or write that the ring of its queue cannot execute, of at most
    /// [`QueueZero::transfer_bytes_max`](super::QueueZero::transfer_bytes_max).
    Transfer {
        offset_bytes: u64,
        gpa: u64,
        len_bytes: u32,
        is_write: bool,
    },
}

impl QueueZeroRequest {
    /// The name of the request for messages.
    pub(in super::super) fn name(&self) -> &'static str {
        match self {
            Self::Flush => "flush",
            Self::Discard { .. } => "discard",
            Self::WriteZeroes { .. } => "write zeroes",
            Self::GetId => "get id",
            Self::Transfer { is_write: true, .. } => "write",
            Self::Transfer { is_write: false, .. } => "read",
        }
    }
}

/// Names a request on queue 0 until the driver takes its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) struct RequestId(pub(super) u64);

/// A copy of the device's answer to a request: another request may already use the place of the answer.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Answer {
    pub(super) status: u8,
    pub(super) bytes: [u8; ANSWER_BYTES as usize],
}

impl Answer {
    /// # Errors
    ///
    /// The device failed the request `what`.
    pub(in super::super) fn check(&self, what: &'static str) -> Result<(), Error> {
        match self.status {
            status if u32::from(status) == VIRTIO_BLK_S_OK => Ok(()),
            status => Err(Error::Status { what, status }),
        }
    }

    /// The serial number in the answer to GET_ID: at most 20 characters.
    pub(in super::super) fn serial(&self) -> String {
        let id: Vec<u8> = self.bytes[..ID_BYTES].iter().copied().take_while(|&byte| byte != 0).collect();
        String::from_utf8_lossy(&id).into_owned()
    }
}
