//! What a confined process does, and so which system calls it keeps.

/// What a process does once it has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// It serves a device: front-ends, operators, virtqueues on the io_urings of its workers, which are there by now. It makes no other
    /// io_uring: its guest has no rings, or a [ring process](Self::RingProcess) makes them.
    Server,
    /// It makes rings for the guest of a server, which asks for them over sockets. It serves no socket and executes no I/O itself.
    RingProcess,
}

/// What needs a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Each process.
    Process,
    /// Serving a device.
    Serving,
    /// Making rings for guests.
    Rings,
}

impl Role {
    /// Whether a process of this role has the part.
    pub(super) fn has(self, part: Part) -> bool {
        match part {
            Part::Process => true,
            Part::Serving => self == Self::Server,
            Part::Rings => self == Self::RingProcess,
        }
    }
}
