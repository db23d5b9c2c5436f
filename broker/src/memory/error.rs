//! Why guest memory is refused.

use std::io;

use crate::limits::MemlockError;

/// Why a region, a set of regions, or their pinning was refused. Nothing has changed when this is returned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// There is no region at all.
    #[error("the guest has no memory regions")]
    NoRegions,
    /// A region has no bytes.
    #[error("the memory region at guest-physical {gpa:#x} has no bytes")]
    Empty {
        /// Start of the region.
        gpa: u64,
    },
    /// An address, length or offset is not a multiple of the page size of the file behind the region.
    #[error(
        "the memory region at guest-physical {gpa:#x} has {what} {value:#x}, which is not a multiple of the \
         {page_bytes}-byte pages of its file ({file})"
    )]
    Unaligned {
        /// Start of the region.
        gpa: u64,
        /// `"address"`, `"length"` or `"file offset"`.
        what: &'static str,
        /// The value given.
        value: u64,
        /// Page size of the file, in bytes.
        page_bytes: u64,
        /// The file behind the region.
        file: String,
    },
    /// The region does not end at or below 16 TiB.
    #[error(
        "the memory region at guest-physical {gpa:#x} with {len_bytes:#x} bytes ends above 16 TiB, the most that \
         io_uring's 16384 registered buffers of 1 GiB can cover"
    )]
    TooHigh {
        /// Start of the region.
        gpa: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// The region ends above the last slot that the guest's memory can have without larger slots.
    #[error(
        "the memory region at guest-physical {gpa:#x} with {len_bytes:#x} bytes ends above {} GiB, the most that 16384 \
         registered buffers of {} MiB can cover: the size of the buffers is fixed while there are rings",
        limit_gpa >> 30, (limit_gpa >> 14) >> 20
    )]
    AboveSlots {
        /// Start of the region.
        gpa: u64,
        /// Its length.
        len_bytes: u64,
        /// The end of the last slot.
        limit_gpa: u64,
    },
    /// Two regions share guest-physical addresses.
    #[error(
        "the memory region at guest-physical {gpa:#x} with {len_bytes:#x} bytes overlaps the one at \
         {other_gpa:#x} with {other_len_bytes:#x} bytes"
    )]
    Overlap {
        /// Start of the later region.
        gpa: u64,
        /// Its length.
        len_bytes: u64,
        /// Start of the earlier region.
        other_gpa: u64,
        /// Its length.
        other_len_bytes: u64,
    },
    /// The file behind the region is shorter than the region.
    #[error(
        "the memory region at guest-physical {gpa:#x} needs its file ({file}) to have {needed_bytes} bytes, it has \
         {file_bytes}"
    )]
    FileTooShort {
        /// Start of the region.
        gpa: u64,
        /// The file behind the region.
        file: String,
        /// Offset plus length of the region.
        needed_bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// The file is of a kind whose pages the kernel cannot pin for I/O.
    #[error(
        "the memory region at guest-physical {gpa:#x} is backed by {file} on {file_system}: only memfd, tmpfs and \
         hugetlbfs memory can be used for direct mode (QEMU: -object memory-backend-memfd,share=on)"
    )]
    NotPinnable {
        /// Start of the region.
        gpa: u64,
        /// The file behind the region.
        file: String,
        /// Name of its file system.
        file_system: String,
    },
    /// The file was opened without the right to write.
    #[error(
        "the memory region at guest-physical {gpa:#x} cannot be written through its file ({file}): pass it read-write"
    )]
    NotWritable {
        /// Start of the region.
        gpa: u64,
        /// The file behind the region.
        file: String,
    },
    /// The memory cannot be locked.
    #[error(transparent)]
    Memlock(#[from] MemlockError),
    /// The pages of a slot do not exist and cannot be allocated.
    #[error(
        "the memory at guest-physical {gpa:#x} ({len_bytes:#x} bytes, {file}) cannot be provided: {source}; with huge \
         pages, check HugePages_Free in /proc/meminfo, else the memory limit of this control group"
    )]
    Populate {
        /// Start of the piece.
        gpa: u64,
        /// The length of the piece.
        len_bytes: u64,
        /// The file behind it.
        file: String,
        /// The error that the kernel returned.
        source: io::Error,
    },
    /// The kernel refused to register a slot.
    #[error("registering the {len_bytes:#x} bytes at guest-physical {gpa:#x} as fixed buffer {slot} failed: {source}")]
    Register {
        /// Slot number.
        slot: u32,
        /// Start of the slot's buffer.
        gpa: u64,
        /// Its length.
        len_bytes: u64,
        /// The error that the kernel returned.
        source: io::Error,
    },
    /// The addresses that a slot needs are occupied in this process.
    #[error(
        "virtual address {address:#x} is occupied in this process; guest memory is registered at {base:#x} and above: \
         keep that range free",
        base = super::IOVA_BASE
    )]
    AddressTaken {
        /// The occupied address.
        address: u64,
    },
    /// The kernel refused to pin that much, for a reason that is not visible from here.
    #[error(
        "the kernel would not pin {} MiB: {source}; {}", needed_bytes.div_ceil(1 << 20), no_memory(*.limit_bytes)
    )]
    NoMemoryToPin {
        /// The memory to pin, in bytes.
        needed_bytes: u64,
        /// The RLIMIT_MEMLOCK in force, if there is one.
        limit_bytes: Option<u64>,
        /// The error that the kernel returned.
        source: io::Error,
    },
    /// Pinned memory is charged to the user, or to no account with CAP_IPC_LOCK, and can be cloned only within one
    /// account.
    #[error(
        "the memory was pinned with other privileges than this process has now (user, or CAP_IPC_LOCK), and the kernel \
         does not share it: drop privileges before pinning"
    )]
    PrivilegesChanged,
    /// Memory can be added to running rings only by cloning it from a spare ring.
    #[error(
        "memory cannot be added to running queues: that needs pinned memory that is shared by cloning, and a kernel with \
         IORING_REGISTER_CLONE_BUFFERS and IORING_REGISTER_DST_REPLACE (Linux 6.13)"
    )]
    CannotPlug,
    /// The caller no longer wanted the memory pinned.
    #[error("pinning was cancelled half-way: it is no longer wanted")]
    NotWanted,
    /// A guest-physical range does not lie in one region.
    #[error("the {len_bytes:#x} bytes at guest-physical {gpa:#x} do not lie inside one memory region of the guest")]
    OutsideRam {
        /// Start of the range.
        gpa: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// Another system call failed.
    #[error("{what} failed: {source}")]
    System {
        /// The step that failed.
        what: &'static str,
        /// The error that the kernel returned.
        source: io::Error,
    },
}

impl MemoryError {
    /// For `map_err` on a system call.
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}

/// The likely reason for a lack of memory that the visible numbers do not explain.
fn no_memory(limit_bytes: Option<u64>) -> String {
    match limit_bytes {
        Some(bytes) => format!(
            "RLIMIT_MEMLOCK is {} KiB and counts for all processes of this user, including those in \
             other containers, and the memory that their rings and ended processes still hold: raise it (LimitMEMLOCK= in \
             a systemd unit), or wait",
            bytes >> 10
        ),
        None => "the machine, or this control group, is short of memory".into(),
    }
}
