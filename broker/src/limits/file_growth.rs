//! Keeping guests from growing a disk image.

use std::io;
use std::sync::{Mutex, PoisonError};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::disk::{Disk, DiskKind};

/// Held while the limit is read and changed: the limit belongs to the process.
static LIMIT: Mutex<()> = Mutex::new(());

/// The largest memfd that a server makes: an in-flight region for 256 queues of 32768 descriptors. The limit holds for
/// memfds too.
const MEMFD_BYTES_MAX: u64 = 129 << 20;

/// Why the growth of files cannot be limited. Nothing has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LimitError {
    /// Writes to the end of the disk would fail.
    #[error(
        "the hard limit of file sizes (RLIMIT_FSIZE) is {hard_bytes} bytes, but the disk has {size_bytes}: start the \
         program with a higher one (root: `ulimit -H -f {}`, or LimitFSIZE={size_bytes} in a systemd unit)",
        .size_bytes.div_ceil(1024)
    )]
    HardTooLow {
        /// The hard limit in bytes.
        hard_bytes: u64,
        /// The size of the disk in bytes.
        size_bytes: u64,
    },
    /// `getrlimit(2)`, `setrlimit(2)` or `sigaction(2)` failed.
    #[error("cannot limit the size of files (RLIMIT_FSIZE): {error}")]
    System {
        /// The error that the kernel returned.
        error: io::Error,
    },
}

/// Makes the kernel refuse every write of this process beyond the end of `disk`, if the disk is a regular file: sets
/// the soft `RLIMIT_FSIZE` to the disk's size and ignores `SIGXFSZ`. Such a write, also one from a ring, then fails
/// with `EFBIG`; a write that begins before the end is cut there. The hard limit stays. A block device cannot grow, so
/// this does nothing for one.
///
/// For programs, never for libraries, because it changes the whole process: it limits *every* file that the process
/// writes, and the `ftruncate(2)` of memfds too. So call it when all memfds have their size (in-flight regions handle
/// the limit themselves), write logs to pipes or terminals, and in a process with several disks call it for the
/// largest. Programs that this process executes inherit both settings.
///
/// # Errors
/// [`LimitError::HardTooLow`] if the hard limit is below the size of the disk, [`LimitError::System`].
pub fn cap_file_growth(disk: &Disk) -> Result<(), LimitError> {
    cap_file_growth_at(disk.kind(), disk.size_bytes())
}

/// The same for a disk of that kind and size, which need not be open yet, or has just been resized.
///
/// # Errors
/// As [`cap_file_growth`].
pub fn cap_file_growth_at(kind: DiskKind, size_bytes: u64) -> Result<(), LimitError> {
    if kind == DiskKind::BlockDevice {
        return Ok(());
    }
    let system = |errno: nix::Error| LimitError::System { error: errno.into() };
    let _limit = LIMIT.lock().unwrap_or_else(PoisonError::into_inner);
    let (_, hard_bytes) = getrlimit(Resource::RLIMIT_FSIZE).map_err(system)?;
    if hard_bytes != RLIM_INFINITY && hard_bytes < size_bytes {
        return Err(LimitError::HardTooLow { hard_bytes, size_bytes });
    }
    // The signal first, because its default action ends the process.
    // SAFETY: ignoring a signal installs no handler, so no code can run in signal context.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.map_err(system)?;
    setrlimit(Resource::RLIMIT_FSIZE, size_bytes, hard_bytes).map_err(system)
}

/// Sets the hard `RLIMIT_FSIZE` to `size_max_bytes`, or to 129 MiB if that is more, because in-flight regions are files
/// too. A process without CAP_SYS_RESOURCE can never raise the limit again: not even code that has taken it over makes a
/// larger file. A lower limit stays. A block device cannot grow, so this does nothing for one.
///
/// For programs, never for libraries, because it changes the whole process.
///
/// # Errors
/// [`LimitError::System`].
pub fn bound_file_growth(kind: DiskKind, size_max_bytes: u64) -> Result<(), LimitError> {
    if kind == DiskKind::BlockDevice {
        return Ok(());
    }
    let system = |errno: nix::Error| LimitError::System { error: errno.into() };
    let _limit = LIMIT.lock().unwrap_or_else(PoisonError::into_inner);
    let (soft_bytes, hard_bytes) = getrlimit(Resource::RLIMIT_FSIZE).map_err(system)?;
    let bound_bytes = size_max_bytes.max(MEMFD_BYTES_MAX);
    // RLIM_INFINITY is the largest number.
    setrlimit(Resource::RLIMIT_FSIZE, soft_bytes.min(bound_bytes), hard_bytes.min(bound_bytes)).map_err(system)
}

/// Lengthens a file that is not a disk, such as a memfd: `grow` gives it `size_bytes` bytes, which the cap for a
/// smaller disk would forbid. Meanwhile the soft limit is at least that large, if the hard limit allows it; the engine
/// still checks each request itself.
///
/// # Errors
/// Those of `grow`; or the limit cannot be set.
pub(crate) fn grow_beyond_cap(size_bytes: u64, grow: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let _limit = LIMIT.lock().unwrap_or_else(PoisonError::into_inner);
    let set =
        |soft_bytes, hard_bytes| setrlimit(Resource::RLIMIT_FSIZE, soft_bytes, hard_bytes).map_err(io::Error::from);
    let (soft_bytes, hard_bytes) = getrlimit(Resource::RLIMIT_FSIZE).map_err(io::Error::from)?;
    // RLIM_INFINITY is the largest number.
    if soft_bytes >= size_bytes {
        return grow();
    }
    set(size_bytes, hard_bytes)?;
    let grown = grow();
    set(soft_bytes, hard_bytes)?;
    grown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hard_limit_below_the_size_is_explained() {
        let error = LimitError::HardTooLow { hard_bytes: 1 << 20, size_bytes: (2 << 20) + 512 };
        assert_eq!(
            error.to_string(),
            "the hard limit of file sizes (RLIMIT_FSIZE) is 1048576 bytes, but the disk has 2097664: start the program \
             with a higher one (root: `ulimit -H -f 2049`, or LimitFSIZE=2097664 in a systemd unit)"
        );
    }
}
