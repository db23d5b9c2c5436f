//! The confinement of the server.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use ringpass_broker::disk::LocatedDisk;
use ringpass_broker::sandbox::{DiskPath, Paths, Restricted, Role, drop_privileges, isolate};

/// The option for confinement.
#[derive(Debug, Args)]
pub(super) struct SandboxArgs {
    /// Whether the server drops all privileges and blocks all files and system calls that it does not need. Use `off`
    /// for debugging only.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = SandboxArg::On)]
    sandbox: SandboxArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SandboxArg {
    On,
    Off,
}

/// The state of a server between the two steps of its confinement.
#[derive(Debug)]
pub(super) struct Sandbox(Option<Restricted>);

impl SandboxArgs {
    /// Whether the server is confined.
    pub(super) fn is_on(&self) -> bool {
        self.sandbox == SandboxArg::On
    }

    /// Hides files and networks, and drops privileges and access to files, for this thread and all threads that it starts. Call this while the
    /// process has one thread, and before the first ring.
    ///
    /// # Errors
    ///
    /// The kernel refuses to confine the process.
    pub(super) fn enter(
        &self,
        disk: &LocatedDisk,
        socket: Option<&Path>,
        control_socket: Option<&Path>,
    ) -> anyhow::Result<Sandbox> {
        if self.sandbox == SandboxArg::Off {
            tracing::warn!(
                "server not confined (--sandbox off): a guest that exploits a hole in this server gets all rights of this user; \
                 use for debugging only"
            );
            return Ok(Sandbox(None));
        }
        let directories = socket.into_iter().chain(control_socket).map(|path| {
            let directory = directory_of(path);
            directory.canonicalize().with_context(|| format!("cannot find the directory {}", directory.display()))
        });
        let directories: Vec<PathBuf> = directories.collect::<anyhow::Result<_>>()?;
        if let Some(why) = isolate(&directories)?.why_not() {
            tracing::info!(
                "server sees names and properties of other files, and networks: no namespaces of its own ({why}). It needs \
                 CAP_SYS_ADMIN or a user namespace for them"
            );
        }
        let unprivileged = drop_privileges()?;
        let paths = Paths::none()
            .disk(DiskPath { file: disk.anchor(), is_written: !disk.is_read_only() })
            .socket_directories(directories.iter().map(PathBuf::as_path));
        let restricted = unprivileged.restrict_paths(&paths)?;
        if let Some(why) = restricted.why_no_landlock() {
            tracing::warn!("file access not confined: {why}. Only the rights of the server's user keep it from files");
        }
        Ok(Sandbox(Some(restricted)))
    }
}

impl Sandbox {
    /// Blocks unneeded system calls for all threads. Call this when the server has started.
    pub(super) fn close(self) -> anyhow::Result<()> {
        let Some(restricted) = self.0 else { return Ok(()) };
        Ok(restricted.filter_system_calls(Role::Server)?)
    }
}

pub(super) fn directory_of(socket: &Path) -> &Path {
    match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
