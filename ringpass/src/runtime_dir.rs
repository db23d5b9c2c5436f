//! The directory of the devices' control sockets.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Suffix of the names of control sockets.
pub(crate) const SUFFIX: &str = ".control";

/// The directory of this user's devices. `None`: `XDG_RUNTIME_DIR` is not set, and the user is not root.
pub(crate) fn for_this_user() -> Option<PathBuf> {
    // systemd sets the variable for a unit with RuntimeDirectory=.
    if let Some(directory) = std::env::var_os("RUNTIME_DIRECTORY").filter(|directory| !directory.is_empty()) {
        return Some(directory.into());
    }
    if rustix::process::geteuid().is_root() {
        return Some("/run/ringpass".into());
    }
    std::env::var_os("XDG_RUNTIME_DIR").map(|directory| PathBuf::from(directory).join("ringpass"))
}

/// Creates the directory, accessible to its owner only, if it does not exist.
pub(crate) fn make(directory: &Path) -> anyhow::Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.with_context(|| format!("cannot create {}", directory.display()))
}
