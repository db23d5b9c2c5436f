//! The table of operations, one row for each.

mod files;
mod network;
mod paths;
mod rings;
mod waits;

use super::{Ends, OperationFacts, Reach};
use crate::operation::{LinuxVersion, Operation};

const NOTHING: Reach = Reach::empty();
const READS: Reach = Reach::READS_MEMORY;
const WRITES: Reach = Reach::WRITES_MEMORY;
const FILES: Reach = Reach::OTHER_FILES;
const NETWORK: Reach = Reach::NETWORK;
const UNBOUNDED: Reach = Reach::UNBOUNDED_MEMORY;

const AT_ONCE: Ends = Ends::AtOnce;
const DEVICE: Ends = Ends::WithDevice;
const WORKER: Ends = Ends::WithWorker;
const EVENT: Ends = Ends::WithEvent;

const fn row(
    operation: Operation,
    does: &'static str,
    reach: Reach,
    ends: Ends,
    source: &'static str,
) -> OperationFacts {
    OperationFacts { operation, does, reach, ends, takes_file: false, buffer_select_since: None, source }
}

impl OperationFacts {
    /// The operation works on the file of `fd`.
    const fn on_file(mut self) -> Self {
        self.takes_file = true;
        self
    }

    /// The operation takes provided buffers since this release.
    const fn select(mut self, major: u8, minor: u8) -> Self {
        self.buffer_select_since = Some(LinuxVersion { major, minor });
        self
    }
}

/// The number of operations that have a row.
const OPERATIONS: usize =
    files::ROWS.len() + network::ROWS.len() + paths::ROWS.len() + rings::ROWS.len() + waits::ROWS.len();

/// The rows, in the order of the operations' numbers. It does not compile if a number is missing or has two rows.
pub(super) const TABLE: &[OperationFacts; OPERATIONS] = &{
    let groups = [files::ROWS, network::ROWS, paths::ROWS, rings::ROWS, waits::ROWS];
    let mut rows = [None; OPERATIONS];
    let mut group = 0;
    while group < groups.len() {
        let mut index = 0;
        while index < groups[group].len() {
            let facts = groups[group][index];
            let code = facts.operation.code() as usize;
            assert!(rows[code].is_none(), "two rows for one operation");
            rows[code] = Some(facts);
            index += 1;
        }
        group += 1;
    }
    let mut table = [files::ROWS[0]; OPERATIONS];
    let mut code = 0;
    while code < OPERATIONS {
        table[code] = rows[code].expect("a row for each number");
        code += 1;
    }
    table
};
