//! The abilities of io_uring that direct mode is built on.

/// An ability of the kernel's io_uring that the probe tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Feature {
    /// A ring that starts disabled accepts the direct policy and enforces it once enabled.
    Restrictions,
    /// A table of 16384 empty fixed buffers: 16 TiB of guest memory.
    LargeBufferTable,
    /// Pinning memory of a memfd as a fixed buffer.
    PinnedMemory,
    /// A completion eventfd.
    CompletionEventfd,
    /// Limits on io-wq workers.
    WorkerLimits,
    /// A ring without an SQ array.
    NoSqArray,
    /// A ring in memory of the caller, one page for each area.
    CallerMemory,
    /// A ring in memory of the caller, several pages for each area, not physically contiguous.
    ScatteredCallerMemory,
    /// A kernel thread that takes submissions, made with the capabilities of this process.
    SubmissionPolling,
    /// The same without any capability.
    UnprivilegedSubmissionPolling,
    /// Several rings on one submission thread.
    SharedSubmissionThread,
    /// Cloning another ring's buffer table.
    ClonedBuffers,
    /// Cloning single slots of another ring's table.
    ClonedBufferSlots,
}

/// The properties of a feature, apart from whether it works here.
pub(super) struct Traits {
    /// Stable name, for programs.
    pub(super) name: &'static str,
    /// Title, for people.
    pub(super) title: &'static str,
    /// Its name in the kernel's interface, and the first kernel that has it.
    pub(super) since: &'static str,
    /// The modes that need it.
    pub(super) need: Need,
    /// The loss without it.
    pub(super) without: &'static str,
}

/// The modes that need a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Direct mode in both placements.
    Direct,
    /// Direct mode with rings in guest RAM.
    GuestRam,
    /// No mode: there is an alternative.
    Optional,
}

impl Feature {
    /// All features, in the order of the report.
    pub const ALL: [Self; 13] = [
        Self::Restrictions,
        Self::LargeBufferTable,
        Self::PinnedMemory,
        Self::CompletionEventfd,
        Self::WorkerLimits,
        Self::NoSqArray,
        Self::CallerMemory,
        Self::ScatteredCallerMemory,
        Self::SubmissionPolling,
        Self::UnprivilegedSubmissionPolling,
        Self::SharedSubmissionThread,
        Self::ClonedBuffers,
        Self::ClonedBufferSlots,
    ];

    pub(super) const fn traits(self) -> Traits {
        let (name, title, since, need, without) = match self {
            Self::Restrictions => (
                "restrictions",
                "restricted rings",
                "IORING_SETUP_R_DISABLED and IORING_REGISTER_RESTRICTIONS, Linux 5.10",
                Need::Direct,
                "a guest could make the host do anything",
            ),
            Self::LargeBufferTable => (
                "large-buffer-table",
                "table of 16384 fixed buffers",
                "a sparse IORING_REGISTER_BUFFERS2, Linux 5.19",
                Need::Direct,
                "guest memory cannot be found by its address",
            ),
            Self::PinnedMemory => (
                "pinned-memory",
                "pinning memory as a fixed buffer",
                "IORING_REGISTER_BUFFERS_UPDATE, Linux 5.13",
                Need::Direct,
                "guest memory cannot be used for I/O without the broker",
            ),
            Self::CompletionEventfd => (
                "completion-eventfd",
                "completion eventfd",
                "IORING_REGISTER_EVENTFD, Linux 5.2",
                Need::Direct,
                "a completion cannot interrupt the guest",
            ),
            Self::WorkerLimits => (
                "worker-limits",
                "limits on io-wq workers",
                "IORING_REGISTER_IOWQ_MAX_WORKERS, Linux 5.15",
                Need::Direct,
                "a guest could fill the host with worker threads",
            ),
            Self::NoSqArray => (
                "no-sq-array",
                "rings without an SQ array",
                "IORING_SETUP_NO_SQARRAY, Linux 6.6",
                Need::Direct,
                "the ring does not have the layout that guests expect",
            ),
            Self::CallerMemory => (
                "caller-memory",
                "rings in memory of the caller",
                "IORING_SETUP_NO_MMAP, Linux 6.5",
                Need::GuestRam,
                "rings cannot be in guest RAM",
            ),
            Self::ScatteredCallerMemory => (
                "scattered-caller-memory",
                "rings in scattered memory of the caller",
                "IORING_SETUP_NO_MMAP with pages that are not contiguous, Linux 6.10",
                Need::GuestRam,
                "only rings of one page, or in guest RAM on huge pages, could be in guest RAM",
            ),
            Self::SubmissionPolling => (
                "submission-polling",
                "submission polling (SQPOLL)",
                "IORING_SETUP_SQPOLL, without privileges since Linux 5.13",
                Need::Optional,
                "every submission needs a doorbell and a system call of the broker (kick mode)",
            ),
            Self::UnprivilegedSubmissionPolling => (
                "unprivileged-submission-polling",
                "submission polling without any capability",
                "IORING_SETUP_SQPOLL without privileges, Linux 5.13",
                Need::Optional,
                "an unprivileged broker is left with kick mode",
            ),
            Self::SharedSubmissionThread => (
                "shared-submission-thread",
                "one SQ thread for several queues",
                "IORING_SETUP_ATTACH_WQ with SQPOLL, Linux 5.11",
                Need::Optional,
                "each polled queue takes a CPU of its own",
            ),
            Self::ClonedBuffers => (
                "cloned-buffers",
                "cloning pinned memory to further queues",
                "IORING_REGISTER_CLONE_BUFFERS, Linux 6.12",
                Need::Optional,
                "each further queue pins the guest's RAM again, and is charged for it again",
            ),
            Self::ClonedBufferSlots => (
                "cloned-buffer-slots",
                "cloning single slots into a running queue",
                "IORING_REGISTER_CLONE_BUFFERS with IORING_REGISTER_DST_REPLACE, Linux 6.13",
                Need::Optional,
                "memory that is plugged in at run time holds up I/O while it is pinned",
            ),
        };
        Traits { name, title, since, need, without }
    }
}
