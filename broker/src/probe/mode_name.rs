//! The names of the modes.

use serde::Serialize;

/// One way of executing a guest's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ModeName {
    /// The guest's own ring, executed by the kernel; its memory is guest RAM.
    DirectGuestRam,
    /// The guest's own ring, executed by the kernel; its memory is a window that the embedder shows to the guest.
    DirectWindow,
    /// The guest's own ring, executed by the broker.
    Mediated,
    /// A standard virtio-blk queue, executed by the broker.
    Virtqueue,
}

impl ModeName {
    /// Both placements of direct mode.
    pub(super) const DIRECT: [Self; 2] = [Self::DirectGuestRam, Self::DirectWindow];

    /// All modes in which io_uring does the I/O, which are all modes that are built.
    pub(super) const KERNEL_EXECUTED: [Self; 3] = [Self::DirectGuestRam, Self::DirectWindow, Self::Virtqueue];

    /// Title, for people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::DirectGuestRam => "direct, rings in guest RAM",
            Self::DirectWindow => "direct, rings in a window",
            Self::Mediated => "mediated",
            Self::Virtqueue => "virtqueue",
        }
    }
}
