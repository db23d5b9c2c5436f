//! What each io_uring operation can reach, with the sources.
//!
//! "The owner" is the process that created the ring: operations use its address space, descriptors and credentials,
//! regardless of who writes the SQEs. The sources are functions in files of the kernel's tree (Linux 7.0), and man
//! pages. The tests of this project show the "testable" rows on a real ring.

mod table;

use core::fmt;

use bitflags::bitflags;

use crate::{
    operation::{LinuxVersion, Operation},
    set::OperationSet,
};
use table::TABLE;

bitflags! {
    /// What an operation can reach in addition to registered buffers and the files of the ring's table.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Reach: u16 {
        /// Reads memory of the owner at an address in the SQE. (At least the errno shows whether the address is
        /// mapped.)
        const READS_MEMORY = 1 << 0;
        /// Writes or discards memory of the owner at an address in the SQE.
        const WRITES_MEMORY = 1 << 1;
        /// Files outside the ring's table, even with `IOSQE_FIXED_FILE`: by path or descriptor, or by opening, closing
        /// and exchanging descriptors and table slots.
        const OTHER_FILES = 1 << 2;
        /// Sockets.
        const NETWORK = 1 << 3;
        /// Other processes and threads: waits for them, wakes them.
        const PROCESSES = 1 << 4;
        /// Kernel memory without bound: any number of requests that wait for ever or queue for io-wq workers.
        const UNBOUNDED_MEMORY = 1 << 5;
        /// Other rings.
        const OTHER_RINGS = 1 << 6;
        /// Commands of a driver or file system, with their unknown effects.
        const DRIVER_COMMANDS = 1 << 7;
        /// The size of the file; the allocation of blocks even beyond `RLIMIT_FSIZE`.
        const FILE_SIZE = 1 << 8;
    }
}

impl Reach {
    /// The description in words, to follow the word "reaches".
    #[must_use]
    pub fn description(self) -> &'static str {
        match self {
            Self::READS_MEMORY => "any address of the ring's owner, to read",
            Self::WRITES_MEMORY => "any address of the ring's owner, to write",
            Self::OTHER_FILES => "files outside the ring's table",
            Self::NETWORK => "the network",
            Self::PROCESSES => "other processes and threads",
            Self::UNBOUNDED_MEMORY => "kernel memory without bound",
            Self::OTHER_RINGS => "other rings",
            Self::DRIVER_COMMANDS => "the commands of drivers and file systems",
            Self::FILE_SIZE => "the size of the file",
            _ => "several things",
        }
    }
}

/// The descriptions, separated by commas; "nothing else" for an empty reach.
impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing else");
        }
        let mut separator = "";
        for part in self.iter() {
            write!(f, "{separator}{}", part.description())?;
            separator = ", ";
        }
        Ok(())
    }
}

/// What a request waits for before it ends, and so what bounds the number of requests that a guest has under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Ends {
    /// It waits for nothing: it ends while the kernel takes it off the ring. Nothing is left of it but its CQE, which
    /// the kernel keeps until the guest takes it.
    AtOnce,
    /// The request waits for the device or the page cache that serves a read or write.
    WithDevice,
    /// The request always waits for a worker thread of the kernel (io-wq), or does so for some files. The queue to the
    /// workers has no bound.
    WithWorker,
    /// The request waits for an event outside the ring, which may never come. Requests that wait have no bound.
    WithEvent,
}

impl Ends {
    /// Whether the kernel keeps as many unfinished requests of this kind as a guest submits.
    #[must_use]
    pub const fn is_unbounded(self) -> bool {
        matches!(self, Self::WithWorker | Self::WithEvent)
    }

    /// The description in words, to follow the words "a request".
    #[must_use]
    pub const fn description(self) -> &'static str {
        match self {
            Self::AtOnce => "ends at once",
            Self::WithDevice => "ends when the device has done it",
            Self::WithWorker => "waits for a worker thread of the kernel",
            Self::WithEvent => "may wait for ever",
        }
    }
}

/// The facts about an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OperationFacts {
    /// The operation.
    pub operation: Operation,
    /// What the operation does, to follow the words "a guest can".
    pub does: &'static str,
    /// What the operation can reach in addition to registered buffers and the files of the table.
    pub reach: Reach,
    /// What a request of this operation waits for.
    pub ends: Ends,
    /// Whether the operation works on the file of `fd`, which is a slot of the table with `IOSQE_FIXED_FILE`.
    pub takes_file: bool,
    /// The first release in which the operation takes provided buffers (`IOSQE_BUFFER_SELECT`); `None` for never.
    pub buffer_select_since: Option<LinuxVersion>,
    /// The source of these facts.
    pub source: &'static str,
}

impl Operation {
    /// The facts about the operation; `None` for an operation newer than this crate (Linux 7.0).
    #[must_use]
    pub fn facts(self) -> Option<&'static OperationFacts> {
        TABLE.get(usize::from(self.code()))
    }
}

pub(crate) fn buffer_select_since(operation: Operation) -> Option<LinuxVersion> {
    operation.facts().and_then(|facts| facts.buffer_select_since)
}

/// All operations that this crate has a number for.
pub(crate) const NUMBERED: OperationSet = OperationSet::below(TABLE.len() as u16);

/// The operations that take provided buffers on the newest kernel.
pub(crate) const BUFFER_SELECT: OperationSet = {
    let mut words = [0u64; 4];
    let mut code = 0;
    while code < TABLE.len() {
        if TABLE[code].buffer_select_since.is_some() {
            words[code / 64] |= 1 << (code % 64);
        }
        code += 1;
    }
    OperationSet::from_words(words)
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_row_with_a_source() {
        assert_eq!(TABLE.len(), Operation::named().count());
        for (code, facts) in (0..).zip(TABLE) {
            assert_eq!(facts.operation.code(), code);
            assert_eq!(facts.operation.facts(), Some(facts));
            assert!(!facts.does.is_empty() && facts.source.contains('.'), "{}", facts.operation);
        }
        assert_eq!(Operation::new(65).facts(), None);
    }

    #[test]
    fn every_part_of_a_reach_has_its_own_description() {
        let words: std::collections::BTreeSet<&str> = Reach::all().iter().map(Reach::description).collect();
        assert_eq!(words.len(), Reach::all().iter().count());
        assert!(!words.contains("several things"));
        assert_eq!(Reach::empty().to_string(), "nothing else");
        assert_eq!((Reach::NETWORK | Reach::OTHER_RINGS).to_string(), "the network, other rings");
    }

    #[test]
    fn kernel_memory_without_bound_is_reached_by_requests_that_wait() {
        for facts in TABLE.iter().filter(|facts| facts.reach.contains(Reach::UNBOUNDED_MEMORY)) {
            // These end at once, and leave memory behind: buffers, and completions of another ring.
            let leaves_memory = [Operation::PROVIDE_BUFFERS, Operation::MSG_RING].contains(&facts.operation);
            assert_eq!(facts.ends.is_unbounded(), !leaves_memory, "{}", facts.operation);
        }
    }

    #[test]
    fn only_reads_and_writes_end_with_the_device() {
        for facts in TABLE {
            let name = facts.operation.to_string();
            let transfers = ["IORING_OP_READ", "IORING_OP_WRITE"].iter().any(|begin| name.starts_with(begin))
                && facts.operation != Operation::READ_MULTISHOT;
            assert_eq!(facts.ends == Ends::WithDevice, transfers, "{name}");
        }
    }

    #[test]
    fn no_operation_takes_provided_buffers_before_it_exists() {
        for facts in TABLE {
            assert!(facts.buffer_select_since.is_none_or(|since| Some(since) >= facts.operation.since()));
        }
    }
}
