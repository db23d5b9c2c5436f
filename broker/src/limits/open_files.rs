//! Room for the file descriptors that a front-end passes.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files (`RLIMIT_NOFILE`) to the hard one and returns that.
///
/// A front-end passes a descriptor for each region of the guest's memory, and up to three for each queue: with memory
/// that is plugged in pieces that is several hundred, and the usual soft limit is 1024, for the sake of programs that use
/// `select(2)`.
///
/// For programs, never for libraries, because it changes the whole process.
///
/// # Errors
/// `getrlimit(2)` or `setrlimit(2)` failed; nothing was changed.
pub fn raise_open_files() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let hard = raise_open_files().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    }
}
