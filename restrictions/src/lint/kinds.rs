//! The kinds of findings, and how bad they are.

use core::fmt;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// Sound only under conditions that the policy cannot see to.
    Warning,
    /// A guest gets out, or exhausts the host; or the policy can never be put in force.
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

/// Makes the enum of lints, each with its name and why it matters.
macro_rules! lints {
    ($( $(#[$doc:meta])* $Lint:ident = $name:literal: $why:literal, )+) => {
        /// A kind of finding.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Lint {
            $( $(#[$doc])* $Lint, )+
        }

        impl Lint {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$Lint),+];

            /// The name, for people and for scripts.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$Lint => $name,)+ }
            }

            /// Why it matters, in a sentence or two.
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
    /// A fixed operation that takes its vectors from the owner's memory.
    VectoredFixed = "vectored-fixed":
        "The buffers are registered ones, but the list of them is read at any address of the process that created the \
         ring: the guest learns what is mapped there, and what looks like a list.",
    /// `IOSQE_FIXED_FILE` is not required.
    NoFixedFile = "no-fixed-file":
        "Without the flag the file is a descriptor of the process that created the ring: any of its files, other guests' \
         disks included. Require IOSQE_FIXED_FILE.",
    /// An operation that reaches files by path or descriptor.
    OtherFiles = "files-outside-table":
        "The operation opens, closes, exchanges or names files of the process that created the ring that are not in the \
         ring's table, with the rights of that process.",
    /// `SPLICE` or `TEE`.
    Splice = "splice":
        "The source is named by splice_fd_in, which is a descriptor of the process that created the ring even where \
         IOSQE_FIXED_FILE is required.",
    /// `URING_CMD`.
    UringCommand = "uring-cmd":
        "Drivers and file systems define these commands: an NVMe passthrough command has the whole device and any \
         address, ublk and socket commands have more.",
    /// Provided buffers.
    ProvidedBuffers = "provided-buffers":
        "Provided buffers are addresses of the process that created the ring, they are kept in kernel memory without \
         bound, and most of io_uring's holes were in their code.",
    /// `MSG_RING`.
    MessageRing = "msg-ring":
        "The operation posts completions to other rings and puts files into their tables.",
    /// Sockets.
    Network = "network": "The guest sends and receives with the rights of the process that created the ring.",
    /// Children, futexes.
    Processes = "processes": "The operation waits for children or wakes threads of the process that created the ring.",
    /// Requests that pile up in the kernel.
    UnboundedWork = "unbounded-work":
        "Requests of this kind wait for ever, or go to the kernel's worker threads (io-wq), and the SQ takes as many as \
         the guest writes: kernel memory grows without limit. Such work belongs on a queue of a bounded size.",
    /// Writes that block.
    BlockingWrites = "blocking-writes":
        "A read or write that would block goes to the kernel's worker threads (io-wq), where it queues without limit. Buffered \
         writes do so on file systems that cannot write without blocking (ext4, for one): open images with direct I/O, or \
         bound the memory of the process that created the ring with a control group.",
    /// The size of the file.
    FileSize = "file-size":
        "The guest changes the size and the allocation of the image; RLIMIT_FSIZE does not bound what is allocated beyond \
         the end.",
    /// `NOP`.
    Nop = "nop":
        "NOP with IOSQE_FIXED_FILE leaks references to files on Linux 6.13 to 6.18.38 and up to 7.1.3 (CVE-2026-64426), \
         and a disk has no use for it.",
    /// `IOSQE_ASYNC`.
    AsyncFlag = "async-flag":
        "IOSQE_ASYNC sends every request to the kernel's worker threads (io-wq), where they queue without limit.",
    /// `IOSQE_IO_DRAIN`, `IOSQE_IO_LINK`, `IOSQE_IO_HARDLINK`.
    OrderedRequests = "ordered-requests":
        "Requests that wait for others are kept in kernel memory until those are done; a guest that orders many behind a \
         slow one keeps many.",
    /// `IOSQE_CQE_SKIP_SUCCESS`.
    SkippedCompletions = "skipped-completions":
        "A request that posts no CQE cannot be counted: what is outstanding, and whether all is done, is no longer known \
         from the ring.",
    /// Attributes of reads and writes.
    Attributes = "attributes":
        "From Linux 6.14 attr_ptr of a read or write is read at any address of the process that created the ring, and \
         restrictions cannot forbid it: the errno tells mapped from unmapped. On a block device with an integrity profile \
         the buffer that it names is read and written, too. Let the process hold nothing worth finding, and give no such \
         device to a direct ring.",
    /// Realtime priority.
    RealtimePriority = "realtime-priority":
        "If the process that created the ring had CAP_SYS_NICE or CAP_SYS_ADMIN then, the guest's requests may go before \
         everybody else's. Drop them before the ring is created.",
    /// Nothing in the register class.
    EmptyRegisterClass = "empty-register-class":
        "From Linux 7.0 a table without any register operation leaves them all free, up to it all are denied. Name at \
         least one, so that the policy means the same everywhere.",
    /// Nothing in the SQE class.
    EmptyOperationClass = "empty-operation-class":
        "The policy allows no operation: it cannot be put in force, and a ring under it could do nothing.",
    /// Register operations that change what SQEs reach.
    RegisterGrants = "register-grants":
        "While the ring runs its owner may change what the guest's SQEs reach. The guest cannot call it; whoever takes over \
         the owner can.",
    /// An operation this crate knows nothing of.
    UnknownOperation = "unknown-operation":
        "This version knows nothing of the operation, so nothing can be said about what it reaches.",
    /// Rules that contradict each other.
    Contradiction = "contradiction": "The policy cannot be put in force as it is.",
    /// Rules on fields, in direct mode.
    NotEnforceable = "not-enforceable":
        "The kernel's restrictions see the opcode and the flags only. With rules on fields a policy is for mediated mode.",
    /// An operation that the rules on fields always refuse.
    NeverAllowed = "never-allowed":
        "The policy has rules on fields, and none can judge the fields of this operation: every such SQE is refused.",
    /// Mediated without a limit on requests.
    NoLimit = "no-outstanding-limit":
        "Nothing bounds how many requests the guest has under way at once. Set fields.max_outstanding.",
}

impl fmt::Display for Lint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
