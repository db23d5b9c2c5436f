//! Why a ring is refused.

use std::io;
use std::path::PathBuf;

use ringpass_guest_abi::LayoutError;
use ringpass_restrictions::Finding;

use super::StillRunning;
use crate::disk::DiskError;
use crate::memory::MemoryError;

/// Why a ring could not be created or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The number of entries is impossible for io_uring.
    #[error("{field} is {entries}: it must be a power of two from {min} to {max}{hint}")]
    Entries {
        /// `"sq_entries"` or `"cq_entries"`.
        field: &'static str,
        /// The value given.
        entries: u32,
        /// Smallest value.
        min: u32,
        /// Largest value.
        max: u32,
        /// More about the limit, or nothing.
        hint: &'static str,
    },
    /// An area for the ring is not page-aligned.
    #[error("the {area} area at guest-physical {gpa:#x} is not aligned to 4096 bytes")]
    Unaligned {
        /// `"rings"` or `"SQE"`.
        area: &'static str,
        /// Its guest-physical address.
        gpa: u64,
    },
    /// The two areas share bytes.
    #[error(
        "the rings area at guest-physical {rings_gpa:#x} ({rings_bytes} bytes) and the SQE area at {sqes_gpa:#x} \
         ({sqes_bytes} bytes) overlap"
    )]
    AreasOverlap {
        /// Start of the rings area.
        rings_gpa: u64,
        /// Its length.
        rings_bytes: u64,
        /// Start of the SQE area.
        sqes_gpa: u64,
        /// Its length.
        sqes_bytes: u64,
    },
    /// A ring that runs, or whose I/O has not ended, uses the area.
    #[error(
        "the areas at guest-physical {rings_gpa:#x} and {sqes_gpa:#x} overlap those of a ring that has not ended ({why}): \
         use others, or wait for its end"
    )]
    AreaInUse {
        /// Start of the rings area asked for.
        rings_gpa: u64,
        /// Start of the SQE area asked for.
        sqes_gpa: u64,
        /// How far the other ring is from its end.
        why: StillRunning,
    },
    /// A queue without an SQ thread and without a doorbell would never do anything.
    #[error("the queue has neither an SQ thread nor a doorbell: nothing would submit the requests in its SQ")]
    NoDoorbell,
    /// The guest's memory is unsuitable.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel refused to create the ring.
    #[error("creating the ring failed: {source}{}", hint(.source, *.in_guest_ram))]
    Create {
        /// Whether its memory was to be guest RAM.
        in_guest_ram: bool,
        /// The error that the kernel returned.
        source: io::Error,
    },
    /// The kernel's ring contradicts what the guest ABI says about rings.
    #[error("this kernel's ring has a layout that the guest ABI does not allow for: {0}")]
    Layout(#[from] LayoutError),
    /// This kernel's ring header is larger than the areas allow.
    #[error("this kernel needs {header_bytes} bytes in front of the CQEs, but the guest ABI reserves only 1024")]
    HeaderTooLarge {
        /// The bytes that the kernel needs.
        header_bytes: u32,
    },
    /// The file of a doorbell or of completions is not an eventfd.
    #[error("the {what} is not an eventfd: make it with eventfd(2)")]
    NotAnEventfd {
        /// `"doorbell"` or `"completion"`.
        what: &'static str,
    },
    /// The CPU for the SQ thread cannot be used.
    #[error("the SQ thread cannot run on CPU {cpu}: {source}; allowed are the online CPUs of this process's cpuset")]
    SqThreadCpu {
        /// The CPU asked for.
        cpu: u32,
        /// The error that the kernel returned.
        source: io::Error,
    },
    /// The policy would let its guest escape, or let it exhaust the host.
    #[error(
        "the policy has lint errors: {}; change it (`ringpass policy lint` explains each), or accept what a guest can do \
         with it (--allow-unsafe-policy, CompiledPolicy::accept_unsafe)",
        subjects(errors)
    )]
    UnsafePolicy {
        /// The findings of lint, the errors only.
        errors: Vec<Finding>,
    },
    /// The disk keeps protection information, and its requests would let a guest name any memory of this process.
    #[error(
        "block device {path:?} has an integrity profile ({profile}): a guest with a ring of its own could have the kernel \
         read and write any memory of this process as protection information (attr_ptr, Linux 6.14). Serve it over \
         vhost-user instead, or format the device without protection information"
    )]
    IntegrityProfile {
        /// The path of the disk as it was given.
        path: PathBuf,
        /// The name of the profile.
        profile: String,
    },
    /// The guest's blocks are smaller than those of direct I/O: the kernel would refuse some of its requests.
    #[error(
        "the guest of {path:?} has blocks of {logical_block_bytes} bytes, but direct I/O there takes blocks of \
         {direct_block_bytes}: the kernel executes the requests of a ring as the guest sends them, and would refuse \
         smaller ones. Open the disk with blocks of {direct_block_bytes} bytes (LogicalBlock::DirectIo) if nothing on \
         it was written in smaller ones, or without direct I/O"
    )]
    FinerBlocks {
        /// The path of the disk as it was given.
        path: PathBuf,
        /// The disk's logical block.
        logical_block_bytes: u32,
        /// The block of direct I/O.
        direct_block_bytes: u32,
    },
    /// A query on the disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Another system call failed.
    #[error("{what} failed: {source}")]
    System {
        /// The step that failed.
        what: &'static str,
        /// The error that the kernel returned.
        source: io::Error,
    },
}

impl RingError {
    /// For `map_err` on a system call.
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}

fn subjects(errors: &[Finding]) -> String {
    let each: Vec<String> = errors.iter().map(|error| format!("{} ({})", error.subject, error.lint)).collect();
    each.join(", ")
}

/// The likely reason for a refusal of `io_uring_setup(2)`, and the remedy.
fn hint(source: &io::Error, in_guest_ram: bool) -> &'static str {
    match source.raw_os_error() {
        Some(nix::libc::EPERM | nix::libc::EACCES | nix::libc::ENOSYS) => {
            "; io_uring is forbidden here (kernel.io_uring_disabled or a container's seccomp filter): see `ringpass probe`"
        }
        Some(nix::libc::EINVAL) if in_guest_ram => {
            "; rings in guest RAM need Linux 6.6 (IORING_SETUP_NO_MMAP, IORING_SETUP_NO_SQARRAY), several pages of them 6.10"
        }
        Some(nix::libc::EINVAL) => "; rings for guests need Linux 6.6 (IORING_SETUP_NO_SQARRAY)",
        Some(nix::libc::EFAULT) => "; the pages cannot be pinned: rings must lie in memfd, tmpfs or hugetlbfs memory",
        Some(nix::libc::ENOMEM) => "; ring memory counts against RLIMIT_MEMLOCK: see `ringpass probe`",
        Some(nix::libc::EMFILE | nix::libc::ENFILE) => "; raise the limit of open files (ulimit -n)",
        _ => "",
    }
}
