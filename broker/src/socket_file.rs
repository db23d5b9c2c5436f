//! The socket files that this process made.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A socket file that this process made. Dropping it removes the file, unless another process has put a different file
/// there.
#[derive(Debug)]
pub(crate) struct SocketFile(Arc<Made>);

#[derive(Debug)]
struct Made {
    path: PathBuf,
    /// The same file, for a process that has changed its working directory or has only some directories in sight.
    absolute: PathBuf,
    identity: (u64, u64),
    is_removed: AtomicBool,
}

/// The socket files of this process, for an end of the process that runs no destructors.
static MADE: Mutex<Vec<Weak<Made>>> = Mutex::new(Vec::new());

/// Removes all socket files of this process, which is about to end.
pub(crate) fn remove_socket_files() {
    let made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    made.iter().filter_map(Weak::upgrade).for_each(|file| file.remove());
}

impl SocketFile {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let made = Arc::new(Made {
            path: path.to_owned(),
            absolute: absolute(path)?,
            identity: identity(path)?,
            is_removed: AtomicBool::new(false),
        });
        let mut all = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|file| file.strong_count() > 0);
        all.push(Arc::downgrade(&made));
        Ok(Self(made))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0.path
    }

    pub(crate) fn is_there(&self) -> bool {
        self.0.is_there()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.0.remove();
    }
}

impl Made {
    fn is_there(&self) -> bool {
        identity(&self.absolute).is_ok_and(|found| found == self.identity)
    }

    /// Removes the file once only: a later file at the same path may have the same inode number.
    fn remove(&self) {
        if !self.is_removed.swap(true, Ordering::AcqRel) && self.is_there() {
            let _ = std::fs::remove_file(&self.absolute);
        }
    }
}

/// The path of a directory entry, without links before its name.
fn absolute(path: &Path) -> io::Result<PathBuf> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(parent.canonicalize()?.join(path.file_name().unwrap_or_default()))
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_file_that_was_removed_early_is_not_removed_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vhost-user.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let file = SocketFile::of(&path).unwrap();
        file.0.remove();
        assert!(!path.exists());
        // The other socket may have the same inode number.
        let _other = UnixListener::bind(&path).unwrap();
        file.0.remove();
        drop(file);
        assert!(path.exists());
    }
}
