//! Whether and how the server is confined.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use ringpass_broker::disk::LocatedDisk;
use ringpass_broker::ring::token_places;
use ringpass_broker::sandbox::{Paths, Restricted, drop_privileges, without_privileges};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;

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
    /// Makes sure that the socket can be removed again without privileges.
    ///
    /// # Errors
    ///
    /// It could not.
    pub(super) fn check_directory(&self, socket: Option<&Path>) -> anyhow::Result<()> {
        if self.sandbox == SandboxArg::Off {
            return Ok(());
        }
        let Some(directory) = socket.map(directory_of).filter(|directory| directory.is_dir()) else {
            return Ok(());
        };
        let may =
            without_privileges(|| accessat(CWD, directory, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS))?;
        ensure!(
            may != Err(Errno::ACCESS),
            "{}: without privileges, which the server gives up (--sandbox), it cannot make a socket there: run it as the \
             directory's owner, or pass an open socket with --fd",
            directory.display()
        );
        Ok(())
    }

    /// Gives up privileges and files, for this thread and all that it starts. To be called while there are no others, and
    /// before the first ring.
    ///
    /// # Errors
    ///
    /// The server could not do its work without privileges.
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
        // The server opens it anew for each time that it has the disk.
        disk.refresh_size().context(
            "without privileges, which the server gives up (--sandbox), it cannot open the disk any more: run it as a user who \
             may",
        )?;
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

fn directory_of(socket: &Path) -> &Path {
    match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
