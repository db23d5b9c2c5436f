//! The status byte, the last byte of each request.

use rustix::io::Errno;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

/// How a request ended (VIRTIO 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// `VIRTIO_BLK_S_IOERR`: an error of the device or of the driver.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// `VIRTIO_BLK_S_UNSUPP`: the device does not support this. Linux then does without the operation: it writes zeroes
    /// itself, for example.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

impl Status {
    /// The status of a request that the host's kernel ended with this error.
    ///
    /// VIRTIO has only these two kinds of errors: a full disk and a broken disk look alike to the guest.
    pub fn from_errno(errno: Errno) -> Self {
        match errno {
            // File systems and old kernels return ENOTTY and ENOSYS for a fallocate(2) mode that they lack.
            Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY => Self::Unsupported,
            _ => Self::IoError,
        }
    }

    /// The byte that the driver reads.
    pub fn byte(self) -> u8 {
        self as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_bytes_are_those_of_the_specification() {
        assert_eq!([Status::Ok, Status::IoError, Status::Unsupported].map(Status::byte), [0, 1, 2]);
    }

    #[test]
    fn only_errors_of_missing_operations_are_unsupported() {
        assert_eq!(Status::from_errno(Errno::OPNOTSUPP), Status::Unsupported);
        for errno in [Errno::IO, Errno::NOSPC, Errno::INVAL, Errno::BADF, Errno::FBIG, Errno::PERM, Errno::CANCELED] {
            assert_eq!(Status::from_errno(errno), Status::IoError, "{errno:?}");
        }
    }
}
