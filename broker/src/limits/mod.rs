//! Resource limits of the process that matter to the broker: `RLIMIT_FSIZE` and `RLIMIT_MEMLOCK` (`getrlimit(2)`).

mod file_growth;
mod memlock;

pub use file_growth::{LimitError, cap_file_growth};
pub use memlock::{Memlock, MemlockError, PinnedBy};
