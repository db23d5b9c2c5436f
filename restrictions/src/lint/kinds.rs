//! The kinds of findings and their severities.

use core::fmt;

use crate::accept::Accepted;

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Information.
    Note,
    /// Safe only under conditions that the policy cannot ensure, or an error that the policy accepts.
    Warning,
    /// A guest can escape or exhaust the host, or the policy can never be enforced.
    Error,
}

impl Severity {
    /// `"note"`, `"warning"` or `"error"`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Defines the enum of lints, each with its name and the reason why it matters.
macro_rules! lints {
    ($( $(#[$doc:meta])* $Lint:ident = $name:literal: $why:literal, )+) => {
        /// A kind of finding.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Lint {
            $( $(#[$doc])* $Lint, )+
        }

        impl Lint {
            /// All lints.
            pub const ALL: &'static [Self] = &[$(Self::$Lint),+];

            /// The name, for people and for scripts.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$Lint => $name,)+ }
            }

            /// Why the finding matters, in a sentence or two.
            #[must_use]
            pub const fn why(self) -> &'static str {
                match self { $(Self::$Lint => $why,)+ }
            }
        }
    };
}

lints! {
    /// An operation that works on addresses of the ring's owner.
    RawAddresses = "raw-addresses":
        "The address in the SQE is one of the process that created the ring, not the guest's: the guest reads or writes \
         the memory of that process. Only READ_FIXED and WRITE_FIXED are held to the registered buffers.",
    /// A fixed operation that reads its vectors from the owner's memory.
    VectoredFixed = "vectored-fixed":
        "The buffers are registered, but the kernel reads their list at any address of the process that created the ring: \
         the guest learns what is mapped there, and what looks like a list.",
    /// `IOSQE_FIXED_FILE` is not required.
    NoFixedFile = "no-fixed-file":
        "Without the flag the file is a descriptor of the process that created the ring: any of its files, other guests' \
         disks included. Require IOSQE_FIXED_FILE.",
    /// An operation that reaches files by path or descriptor.
    OtherFiles = "files-outside-table":
        "The operation opens, closes, exchanges or names files outside the ring's table, with the rights of the process that \
         created the ring.",
    /// `SPLICE` or `TEE`.
    Splice = "splice":
        "splice_fd_in names the source: a descriptor of the process that created the ring, even if the policy requires \
         IOSQE_FIXED_FILE.",
    /// `URING_CMD`.
    UringCommand = "uring-cmd":
        "Drivers and file systems define these commands: an NVMe passthrough command reaches the whole device and any \
         address, ublk and socket commands reach more.",
    /// Provided buffers.
    ProvidedBuffers = "provided-buffers":
        "Provided buffers are addresses of the process that created the ring. The kernel stores them without bound, and most \
         of io_uring's holes were in their code.",
    /// `MSG_RING`.
    MessageRing = "msg-ring":
        "The operation posts completions to other rings and puts files into their tables.",
    /// Sockets.
    Network = "network": "The guest sends and receives with the rights of the process that created the ring.",
    /// Children, futexes.
    Processes = "processes": "The operation waits for children or wakes threads of the process that created the ring.",
    /// Requests that accumulate in the kernel.
    UnboundedWork = "unbounded-work":
        "Requests of this kind wait for ever, or go to the kernel's worker threads (io-wq), and the kernel accepts as many as \
         the guest submits: kernel memory grows without limit. Such work belongs on a queue of a bounded size.",
    /// Requests that end at once.
    CompletionFlood = "completion-flood":
        "A request of this kind ends at once and needs no device: the guest makes completions as fast as a CPU can, and the \
         kernel keeps those for which the CQ has no room. A ring with millions of them takes seconds to end, and a disk \
         needs no such operation.",
    /// Writes that block.
    BlockingWrites = "blocking-writes":
        "A read or write that would block goes to the kernel's worker threads (io-wq), which queue without limit. Buffered \
         writes block on file systems that cannot write without blocking (for example ext4): open images with direct I/O, or \
         bound the memory of the process that created the ring with a control group.",
    /// The size of the file.
    FileSize = "file-size":
        "The guest changes the size and the allocation of the image; RLIMIT_FSIZE does not bound the allocation beyond the \
         end.",
    /// `NOP`.
    Nop = "nop":
        "NOP with IOSQE_FIXED_FILE leaks references to files on Linux 6.13 to 6.18.38 and up to 7.1.3 (CVE-2026-64426), \
         and a disk does not need NOP.",
    /// `IOSQE_ASYNC`.
    AsyncFlag = "async-flag":
        "IOSQE_ASYNC sends every request to the kernel's worker threads (io-wq), which queue without limit.",
    /// `IOSQE_IO_DRAIN`, `IOSQE_IO_LINK`, `IOSQE_IO_HARDLINK`.
    OrderedRequests = "ordered-requests":
        "The kernel starts such a request only when others have ended, and keeps all that wait in memory. A guest that puts \
         them behind a request that does not end hangs its own ring: nothing behind it runs, and what waits for the requests of \
         that ring, such as a stop, waits too.",
    /// `IOSQE_CQE_SKIP_SUCCESS`.
    SkippedCompletions = "skipped-completions":
        "A request that posts no CQE cannot be counted: the ring no longer shows how many requests are outstanding, and \
         whether all have ended.",
    /// An acceptance without a finding.
    UnusedAcceptance = "unused-acceptance":
        "The policy accepts errors of a kind that it does not have. The acceptance would hide such an error later: remove it.",
    /// Attributes of reads and writes.
    Attributes = "attributes":
        "From Linux 6.14 the kernel reads attr_ptr of a read or write at any address of the process that created the ring, \
         and restrictions cannot forbid it: the errno shows whether the address is mapped. On a block device with an integrity \
         profile the kernel also reads and writes the buffer that the attribute names. Keep no secrets in the process, and \
         give no such device to a direct ring.",
    /// Realtime priority.
    RealtimePriority = "realtime-priority":
        "If the process that created the ring had CAP_SYS_NICE or CAP_SYS_ADMIN at that time, the guest's requests may take \
         precedence over all others on the host. Drop these capabilities before the ring is created.",
    /// No operation in the register class.
    EmptyRegisterClass = "empty-register-class":
        "From Linux 7.0 a table without any register operation leaves all of them unrestricted, before 7.0 it denies all of \
         them. Allow at least one, so that the policy means the same everywhere.",
    /// No operation in the SQE class.
    EmptyOperationClass = "empty-operation-class":
        "The policy allows no operation: it cannot be enforced, and a ring under it could do nothing.",
    /// Register operations that change what SQEs reach.
    RegisterGrants = "register-grants":
        "While the ring runs, its owner may change what the guest's SQEs reach. The guest cannot call this operation; an \
         attacker who takes over the owner can.",
    /// An operation that this crate does not know.
    UnknownOperation = "unknown-operation":
        "This version does not know the operation, so its reach is unknown.",
    /// Rules that contradict each other.
    Contradiction = "contradiction": "The policy cannot be enforced as it is.",
    /// Rules on fields, in direct mode.
    NotEnforceable = "not-enforceable":
        "The kernel's restrictions cover only the opcode and the flags. A policy with rules on fields is for mediated mode.",
    /// An operation that the rules on fields always refuse.
    NeverAllowed = "never-allowed":
        "The policy has rules on fields, and they cannot judge the fields of this operation: every such SQE is refused.",
    /// Mediated mode without a limit on requests.
    NoLimit = "no-outstanding-limit":
        "Nothing bounds the number of requests that the guest has under way at once. Set fields.max_outstanding.",
}

impl Lint {
    /// The flag by which a policy accepts the errors of this kind; `None` if it cannot.
    #[must_use]
    pub const fn acceptance(self) -> Option<Accepted> {
        match self {
            Self::OrderedRequests => Some(Accepted::ORDERED_REQUESTS),
            Self::UnboundedWork => Some(Accepted::UNBOUNDED_WORK),
            Self::AsyncFlag => Some(Accepted::ASYNC_FLAG),
            Self::CompletionFlood => Some(Accepted::COMPLETION_FLOOD),
            _ => None,
        }
    }
}

impl fmt::Display for Lint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
