//! Room for the file descriptors that a front-end passes.

use std::fs;
use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The number of files that this process has open, and the number that it may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFiles {
    /// Files that are open now (`/proc/self/fd`).
    pub open: u64,
    /// The hard `RLIMIT_NOFILE`, to which [`raise_open_files`] raises the soft one.
    pub limit: u64,
}

/// The limit leaves too few files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}", self.why(), self.change())]
#[non_exhaustive]
pub struct TooFewOpenFiles {
    /// The hard limit.
    pub limit: u64,
    /// The number of open files.
    pub open: u64,
    /// The number of further files that are needed.
    pub needed: u64,
}

impl TooFewOpenFiles {
    pub(crate) fn why(self) -> String {
        let Self { limit, open, needed } = self;
        format!("RLIMIT_NOFILE is {limit}, {open} files are open and {needed} more are needed")
    }

    pub(crate) fn change(self) -> String {
        let total = self.open + self.needed;
        format!(
            "raise the hard RLIMIT_NOFILE to {total} or more (`ulimit -H -n {total}`, LimitNOFILE={total} in a systemd unit, \
             --ulimit nofile={total} for a container)"
        )
    }
}

impl OpenFiles {
    /// Counts the files of this process.
    ///
    /// # Errors
    ///
    /// `/proc` is not mounted, or `getrlimit(2)` fails.
    pub fn current() -> io::Result<Self> {
        let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE)?;
        // One of the entries is the listing itself.
        let open = (fs::read_dir("/proc/self/fd")?.count() as u64).saturating_sub(1);
        Ok(Self { open, limit })
    }

    /// Whether `needed` more files can be opened.
    ///
    /// # Errors
    ///
    /// The limit is too low.
    pub fn check(&self, needed: u64) -> Result<(), TooFewOpenFiles> {
        let Self { open, limit } = *self;
        if open.saturating_add(needed) <= limit { Ok(()) } else { Err(TooFewOpenFiles { limit, open, needed }) }
    }
}

/// Raises the soft limit of open files (`RLIMIT_NOFILE`) to the hard limit and returns the hard limit.
///
/// A front-end passes a descriptor for each region of the guest's memory, and up to three for each queue: with memory
/// that is plugged in pieces these are several hundred. The usual soft limit is 1024, for the sake of programs that use
/// `select(2)`.
///
/// For programs, never for libraries, because it changes the whole process.
///
/// # Errors
/// `getrlimit(2)` or `setrlimit(2)` failed; nothing has changed.
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

    #[test]
    fn too_few_files_are_explained_with_a_limit_that_is_enough() {
        let files = OpenFiles { open: 4, limit: 40 };
        files.check(36).unwrap();
        let text = files.check(37).unwrap_err().to_string();
        assert!(text.starts_with("RLIMIT_NOFILE is 40, 4 files are open and 37 more are needed"), "{text}");
        assert!(text.contains("`ulimit -H -n 41`") && text.contains("LimitNOFILE=41"), "{text}");
    }

    #[test]
    fn an_open_file_counts() {
        // Other tests of this process open files meanwhile, but none of them opens that many.
        let before = OpenFiles::current().unwrap().open;
        let files: Vec<_> = (0..100).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let after = OpenFiles::current().unwrap().open;
        assert!(after + 50 > before + files.len() as u64, "{before}, {after}");
    }
}
