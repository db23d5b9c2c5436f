//! Where the control sockets of devices are.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// What the names of control sockets end with.
pub(crate) const SUFFIX: &str = ".control";

/// The directory of this user's devices. None: there is no such place.
pub(crate) fn for_this_user() -> Option<PathBuf> {
    // Set by systemd for a unit with RuntimeDirectory=.
    if let Some(directory) = std::env::var_os("RUNTIME_DIRECTORY").filter(|directory| !directory.is_empty()) {
        return Some(directory.into());
    }
    if rustix::process::geteuid().is_root() {
        return Some("/run/ringpass".into());
    }
    std::env::var_os("XDG_RUNTIME_DIR").map(|directory| PathBuf::from(directory).join("ringpass"))
}

/// Makes the directory, for its owner only, if it is not there.
pub(crate) fn make(directory: &Path) -> anyhow::Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.with_context(|| format!("making {}", directory.display()))
}
