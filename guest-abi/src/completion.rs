//! What the result of an SQE means for its request: the same in every driver.

/// [`Cqe::res`](crate::Cqe::res), `-EINTR`: the process of the ring was killed.
pub const RES_EINTR: i32 = -4;
/// [`Cqe::res`](crate::Cqe::res), `-EAGAIN`: the kernel could not execute the request without waiting.
pub const RES_EAGAIN: i32 = -11;
/// [`Cqe::res`](crate::Cqe::res), `-ENOMEM`: the kernel had no memory, or the process of the ring was killed.
pub const RES_ENOMEM: i32 = -12;
/// [`Cqe::res`](crate::Cqe::res), `-EFAULT`: the memory is out of reach of rings, or not yet in reach.
pub const RES_EFAULT: i32 = -14;
/// [`Cqe::res`](crate::Cqe::res), `-ECANCELED`: the ring was closed before the kernel began the request.
pub const RES_ECANCELED: i32 = -125;

/// The final error of a request whose completion makes no sense: `EIO`.
const EIO: i32 = 5;

/// What the result of an SQE means for its request.
///
/// A request of several SQEs ends when each of them has its completion; [`and`](Self::and) puts the results together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completed {
    /// All bytes are transferred.
    Done,
    /// The ring or a dying process says so, and not the storage: the driver sends the request on queue 0, or on a queue
    /// that is not attached, and that answer counts. It sends the request to no ring again.
    Again {
        /// Bytes at the beginning of the segment that are transferred.
        done_bytes: u32,
    },
    /// The storage says so: the error is the answer of the request. Repeating a durable write could hide an error of
    /// write-back, which the kernel reports once.
    Failed {
        /// The error, a positive number.
        errno: i32,
    },
}

impl Completed {
    /// Judges the result of an SQE of `len_bytes` bytes.
    #[inline]
    pub fn of(res: i32, len_bytes: u32) -> Self {
        match res {
            RES_EINTR | RES_EAGAIN | RES_ENOMEM | RES_EFAULT | RES_ECANCELED => Self::Again { done_bytes: 0 },
            // The smallest number has no positive counterpart, and no error has it.
            error @ ..0 => Self::Failed { errno: error.checked_neg().unwrap_or(EIO) },
            bytes if bytes as u32 == len_bytes => Self::Done,
            bytes if (bytes as u32) < len_bytes => Self::Again { done_bytes: bytes as u32 },
            // More than was asked for: the device is broken.
            _ => Self::Failed { errno: EIO },
        }
    }

    /// The result of a request of which this and `other` are results of different SQEs: an error counts, whatever the
    /// others say, and then *again*, for the whole request.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (failed @ Self::Failed { .. }, _) | (_, failed @ Self::Failed { .. }) => failed,
            (Self::Again { .. }, _) | (_, Self::Again { .. }) => Self::Again { done_bytes: 0 },
            (Self::Done, Self::Done) => Self::Done,
        }
    }
}

#[cfg(test)]
mod tests;
