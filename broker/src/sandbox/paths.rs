//! Restricting the files that the process can still open: Landlock.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};

use nix::libc;
use rustix::io::Errno;

use super::{SandboxError, Unprivileged};

/// The newest rules that are requested; older kernels apply those that they know.
const NEWEST: ABI = ABI::V6;

/// The paths that a process opens after its start, besides those in `/proc`.
#[derive(Debug)]
#[non_exhaustive]
pub struct Paths<'a> {
    /// The disk, which is opened again each time that this process acquires it. With it the process may read `/sys`, which has the
    /// properties of block devices.
    pub disk: Option<DiskPath<'a>>,
    /// Directories from which the process removes its sockets at the end. It makes them before.
    pub socket_directories: Vec<&'a Path>,
    /// The directory that is the token of each ring ([`crate::ring::token_directory`]), if the process makes rings for
    /// guests.
    pub token_directory: Option<BorrowedFd<'a>>,
}

/// A disk that a process opens again.
#[derive(Clone, Copy, Debug)]
pub struct DiskPath<'a> {
    /// The disk's file, opened in any way.
    pub file: BorrowedFd<'a>,
    /// Whether the disk is written.
    pub is_written: bool,
}

impl<'a> Paths<'a> {
    /// No path except `/proc`.
    pub fn none() -> Self {
        Self { disk: None, socket_directories: Vec::new(), token_directory: None }
    }

    /// Sets [`disk`](Self#structfield.disk).
    #[must_use]
    pub fn disk(self, disk: impl Into<Option<DiskPath<'a>>>) -> Self {
        Self { disk: disk.into(), ..self }
    }

    /// Sets [`socket_directories`](Self#structfield.socket_directories).
    #[must_use]
    pub fn socket_directories(self, directories: impl IntoIterator<Item = &'a Path>) -> Self {
        Self { socket_directories: directories.into_iter().collect(), ..self }
    }

    /// Sets [`token_directory`](Self#structfield.token_directory).
    #[must_use]
    pub fn token_directory(self, directory: impl Into<Option<BorrowedFd<'a>>>) -> Self {
        Self { token_directory: directory.into(), ..self }
    }
}

/// A process that can open almost no files.
#[derive(Debug)]
pub struct Restricted {
    status: RulesetStatus,
    refusal: Option<Errno>,
}

impl Unprivileged {
    /// Leaves this process the paths in `paths`, and reading of `/proc`. Open files stay usable. The process also loses TCP
    /// sockets, and signals to and abstract sockets of processes outside, as far as the kernel knows such rules.
    ///
    /// A kernel without Landlock restricts nothing: [`Restricted::has_landlock`].
    ///
    /// # Errors
    ///
    /// The kernel refuses a rule.
    pub fn restrict_paths(self, paths: &Paths<'_>) -> Result<Restricted, SandboxError> {
        let refusal = landlock_refusal();
        let status = restrict(paths).map_err(SandboxError::system("restricting paths (Landlock)"))?;
        Ok(Restricted { status: status.ruleset, refusal })
    }
}

impl Restricted {
    /// Whether paths are restricted. If not, [`Self::why_no_landlock`] has the reason that the kernel gave.
    pub fn has_landlock(&self) -> bool {
        self.status != RulesetStatus::NotEnforced
    }

    /// Why Landlock is unavailable, and the remedy.
    pub fn why_no_landlock(&self) -> Option<String> {
        if self.has_landlock() {
            return None;
        }
        Some(match self.refusal {
            Some(Errno::NOSYS) => {
                "this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK), or a seccomp filter hides it"
                    .into()
            }
            Some(Errno::OPNOTSUPP) => {
                "Landlock is not enabled: add landlock to lsm= on the kernel's command line".into()
            }
            Some(errno) => format!(
                "the kernel refuses landlock_create_ruleset: {errno}. A seccomp filter of a container probably forbids \
                 it: allow landlock_create_ruleset, landlock_add_rule and landlock_restrict_self there"
            ),
            None => "the kernel knows none of the requested rules".into(),
        })
    }
}

/// The kernel's error when asked for its version of Landlock. The crate treats every refusal as a kernel without
/// Landlock.
fn landlock_refusal() -> Option<Errno> {
    const VERSION: libc::c_uint = 1;
    let no_attributes: *const libc::c_void = std::ptr::null();
    // SAFETY: with this flag the kernel reads no memory and only returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, no_attributes, 0_usize, VERSION) };
    if version >= 0 { None } else { Errno::from_io_error(&io::Error::last_os_error()) }
}

fn restrict(paths: &Paths<'_>) -> io::Result<RestrictionStatus> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let sockets = BitFlags::from(AccessFs::RemoveFile);
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    let mut ruleset = allow(ruleset, Path::new("/proc"), read)?;
    if let Some(disk) = paths.disk {
        let mut access = make_bitflags!(AccessFs::{ReadFile | IoctlDev});
        if disk.is_written {
            access |= make_bitflags!(AccessFs::{WriteFile | Truncate});
        }
        ruleset = ruleset.add_rule(PathBeneath::new(disk.file, access)).map_err(io::Error::other)?;
        ruleset = allow(ruleset, Path::new("/sys"), read)?;
    }
    for path in &paths.socket_directories {
        ruleset = allow(ruleset, path, sockets)?;
    }
    if let Some(directory) = paths.token_directory {
        // Each token opens it once more.
        let open = BitFlags::from(AccessFs::ReadDir);
        ruleset = ruleset.add_rule(PathBeneath::new(directory, open)).map_err(io::Error::other)?;
    }
    ruleset.restrict_self().map_err(io::Error::other)
}

/// Allows `access` beneath a directory, if that exists.
fn allow(ruleset: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> io::Result<RulesetCreated> {
    match PathFd::new(path) {
        Ok(directory) => ruleset.add_rule(PathBeneath::new(directory, access)).map_err(io::Error::other),
        // A missing directory cannot be opened later either; the code that needs it then reports the error.
        Err(_) => Ok(ruleset),
    }
}
