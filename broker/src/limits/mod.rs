//! The resource limits of the process that matter to the broker: `RLIMIT_FSIZE`, `RLIMIT_MEMLOCK` and
//! `RLIMIT_NOFILE` (`getrlimit(2)`).

mod file_growth;
mod freed_memory;
mod memlock;
mod open_files;

pub(crate) use file_growth::grow_beyond_cap;
pub use file_growth::{LimitError, bound_file_growth, cap_file_growth, cap_file_growth_at};
pub(crate) use freed_memory::while_memory_is_freed;
pub use memlock::{Memlock, MemlockError, PinnedBy, raise_memlock};
pub use open_files::{OpenFiles, TooFewOpenFiles, raise_open_files};
