//! Resource limits of the process that matter to the broker: `RLIMIT_FSIZE`, `RLIMIT_MEMLOCK` and
//! `RLIMIT_NOFILE` (`getrlimit(2)`).

mod file_growth;
mod memlock;
mod open_files;

pub(crate) use file_growth::grow_beyond_cap;
pub use file_growth::{LimitError, cap_file_growth, cap_file_growth_at};
pub use memlock::{Memlock, MemlockError, PinnedBy};
pub use open_files::raise_open_files;
