//! The token of a ring, by which the ring's end shows.
//!
//! The tokens of all rings of a process are open file descriptions of one directory. The process makes that directory
//! before the first ring and removes its name at once, so a sandbox need not let it make directories later. Each token
//! has an OFD lock (`fcntl(2)`) on one byte of its own, which the kernel releases with the last reference to the open
//! file description.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{Mode, OFlags};

/// How a directory is opened. The guest can name the token, so it must have no bytes.
const OPEN: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);

static DIRECTORY: OnceLock<OwnedFd> = OnceLock::new();
/// The number of the next token. Tokens with the same number would hide each other's end, so the byte also has the
/// number of the process: a forked process has the same directory.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A file that later only a ring holds.
#[derive(Debug)]
pub(super) struct EndToken {
    held: OwnedFd,
    watch: EndWatch,
}

impl EndToken {
    /// A token in [`token_directory`].
    pub(super) fn new() -> io::Result<Self> {
        token_directory().and_then(Self::of)
    }

    fn of(directory: BorrowedFd<'static>) -> io::Result<Self> {
        let byte = i64::from(process::id()) << 32 | i64::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let held = open_again(directory)?;
        fcntl(&held, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, byte)))?;
        let watch = EndWatch { directory, byte };
        if watch.has_ended()? {
            return Err(io::Error::other("the file system of the temporary directory has no locks"));
        }
        Ok(Self { held, watch })
    }

    /// Drops our descriptor: from here on only the ring holds the token.
    pub(super) fn released_to_ring(self) -> EndWatch {
        self.watch
    }
}

impl AsFd for EndToken {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.as_fd()
    }
}

/// The watching side of a token.
#[derive(Debug)]
pub(super) struct EndWatch {
    directory: BorrowedFd<'static>,
    byte: i64,
}

impl EndWatch {
    /// Whether the ring that held the token has released it.
    pub(super) fn has_ended(&self) -> io::Result<bool> {
        // Asking for a write lock needs no right to write, and the answer tells of every read lock.
        let mut found = lock(libc::F_WRLCK, self.byte);
        fcntl(self.directory, FcntlArg::F_OFD_GETLK(&mut found))?;
        Ok(i32::from(found.l_type) == libc::F_UNLCK)
    }
}

fn lock(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as _, l_whence: libc::SEEK_SET as _, l_start: byte, l_len: 1, l_pid: 0 }
}

/// The directory of which every token is an open file description: nameless, empty, and the same until the process
/// ends. The first call makes it, in `$XDG_RUNTIME_DIR`, `/dev/shm` or `$TMPDIR`. A program that confines itself calls
/// this before.
///
/// # Errors
///
/// No directory can be made in any of these places: the kernel's error for the last.
pub fn token_directory() -> io::Result<BorrowedFd<'static>> {
    if let Some(directory) = DIRECTORY.get() {
        return Ok(directory.as_fd());
    }
    let made = nameless_directory()?;
    Ok(DIRECTORY.get_or_init(|| made).as_fd())
}

/// The directory, if it was made.
#[cfg(feature = "sandbox")]
pub(crate) fn existing_token_directory() -> Option<BorrowedFd<'static>> {
    DIRECTORY.get().map(OwnedFd::as_fd)
}

/// Whether the end of a ring can be detected here: this requires that a directory can be made in one of the places of
/// [`token_directory`], and locked.
///
/// # Errors
///
/// The kernel's error for the last place.
pub fn try_end_token() -> io::Result<()> {
    let directory = nameless_directory()?;
    fcntl(open_again(&directory)?, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, 0)))?;
    Ok(())
}

/// A new open file description of a directory, which need not have a name.
fn open_again(directory: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(directory, ".", OPEN, Mode::empty())?)
}

/// A new directory of our own without a name, in memory if possible.
fn nameless_directory() -> io::Result<OwnedFd> {
    let path = temporary_directory()?;
    let opened = rustix::fs::open(&path, OPEN, Mode::empty());
    let removed = std::fs::remove_dir(&path);
    let directory = opened?;
    removed?;
    Ok(directory)
}

fn temporary_directory() -> io::Result<PathBuf> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    for place in runtime.into_iter().chain([PathBuf::from("/dev/shm"), std::env::temp_dir()]) {
        for _ in 0..16 {
            let name = format!(".ringpass-{}-{:016x}", process::id(), random()?);
            let path = place.join(name);
            match rustix::fs::mkdir(&path, Mode::RWXU) {
                Ok(()) => return Ok(path),
                Err(rustix::io::Errno::EXIST) => {}
                Err(error) => {
                    last = error.into();
                    break;
                }
            }
        }
    }
    let text = format!(
        "no place for a temporary directory ($XDG_RUNTIME_DIR, /dev/shm, $TMPDIR): {last}; mount a tmpfs at /dev/shm, \
         or name a writable directory with TMPDIR=DIRECTORY"
    );
    Err(io::Error::new(last.kind(), text))
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_ends_with_the_last_reference_to_it_and_not_with_another_token() {
        let (one, other) = (EndToken::new().unwrap(), EndToken::new().unwrap());
        let in_a_ring = one.as_fd().try_clone_to_owned().unwrap();
        let watch = one.released_to_ring();
        assert!(!watch.has_ended().unwrap());
        let other = other.released_to_ring();
        assert!(other.has_ended().unwrap() && !watch.has_ended().unwrap());
        drop(in_a_ring);
        assert!(watch.has_ended().unwrap());
    }

    #[test]
    fn a_token_has_no_name_and_no_bytes() {
        let token = EndToken::new().unwrap();
        assert_eq!(rustix::fs::fstat(&token).unwrap().st_nlink, 0);
        assert_eq!(rustix::io::read(&token, &mut [0; 1]), Err(rustix::io::Errno::ISDIR));
        let write = rustix::io::write(&token, &[0]);
        assert_eq!(write, Err(rustix::io::Errno::BADF));
        let made = rustix::fs::mkdirat(&token, "below", Mode::RWXU);
        assert_eq!(made, Err(rustix::io::Errno::NOENT));
    }
}
