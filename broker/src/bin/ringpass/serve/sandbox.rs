//! Whether and how the server is confined.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use ringpass_broker::disk::LocatedDisk;
use ringpass_broker::ring::token_places;
use ringpass_broker::sandbox::{Paths, Restricted, drop_privileges};

/// The option about confinement.
#[derive(Debug, Args)]
pub(super) struct SandboxArgs {
    /// Whether the server gives up all privileges, files and system calls that it does not need. Off: for debugging only.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = SandboxArg::On)]
    sandbox: SandboxArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SandboxArg {
    On,
    Off,
}

/// A server on its way into the sandbox.
#[derive(Debug)]
pub(super) struct Sandbox(Option<Restricted>);

impl SandboxArgs {
    /// Whether the server is confined.
    pub(super) fn is_on(&self) -> bool {
        self.sandbox == SandboxArg::On
    }

    /// Gives up privileges and files, for this thread and all that it starts. To be called while there are no others, and
    /// before the first ring.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(super) fn enter(
        &self,
        disk: &LocatedDisk,
        socket: Option<&Path>,
        control_socket: Option<&Path>,
    ) -> anyhow::Result<Sandbox> {
        if self.sandbox == SandboxArg::Off {
            tracing::warn!(
                "--sandbox off: a guest that finds a hole in this server has all that this user has; for debugging only"
            );
            return Ok(Sandbox(None));
        }
        let unprivileged = drop_privileges()?;
        let places: Vec<PathBuf> = token_places();
        let paths = Paths {
            disk: disk.anchor(),
            is_written: !disk.is_read_only(),
            socket_directories: socket.into_iter().chain(control_socket).map(directory_of).collect(),
            token_places: places.iter().map(PathBuf::as_path).collect(),
        };
        let restricted = unprivileged.restrict_paths(&paths)?;
        if let Some(why) = restricted.why_no_landlock() {
            tracing::warn!("{why}. Without it only its user's rights keep the server from files");
        }
        Ok(Sandbox(Some(restricted)))
    }
}

impl Sandbox {
    /// Gives up system calls, for all threads: the server has started.
    pub(super) fn close(self) -> anyhow::Result<()> {
        Ok(self.0.map(Restricted::filter_system_calls).transpose().map(drop)?)
    }
}

pub(super) fn directory_of(socket: &Path) -> &Path {
    match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
