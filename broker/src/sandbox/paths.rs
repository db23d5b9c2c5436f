//! Which files the process can still open: Landlock.

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

/// The newest rules that are asked for; kernels that know fewer keep to those.
const NEWEST: ABI = ABI::V6;

/// What serving opens after it has started.
#[derive(Debug)]
pub struct Paths<'a> {
    /// The disk, opened anew for each time that this process has it.
    pub disk: BorrowedFd<'a>,
    /// Whether it is written.
    pub is_written: bool,
    /// Directories in which sockets are made, and removed at the end.
    pub socket_directories: Vec<&'a Path>,
    /// Directories in which each ring makes a directory for a moment ([`crate::ring::token_places`]).
    pub token_places: Vec<&'a Path>,
}

/// A process that can open next to nothing.
#[derive(Debug)]
pub struct Restricted {
    status: RulesetStatus,
    refusal: Option<Errno>,
}

impl Unprivileged {
    /// Leaves this process what `paths` names, and what `/proc` and `/sys` say. Files that are open stay usable. Nor are there
    /// TCP sockets any more, or signals and abstract sockets of processes outside, as far as the kernel knows such rules.
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
    /// False: paths are not restricted, for the [reason](Self::why_no_landlock) that the kernel gave.
    pub fn has_landlock(&self) -> bool {
        self.status != RulesetStatus::NotEnforced
    }

    /// Why there is no Landlock, and what to do.
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
                "the kernel refuses landlock_create_ruleset: {errno}. Most likely a container's seccomp filter forbids it: allow \
                 landlock_create_ruleset, landlock_add_rule and landlock_restrict_self there"
            ),
            None => "the kernel knows none of the rules that are asked for".into(),
        })
    }
}

/// What the kernel says when it is asked for its version of Landlock. The crate takes every refusal for a kernel without it.
fn landlock_refusal() -> Option<Errno> {
    const VERSION: libc::c_uint = 1;
    let no_attributes: *const libc::c_void = std::ptr::null();
    // SAFETY: with this flag the kernel reads no memory and only gives a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, no_attributes, 0_usize, VERSION) };
    if version >= 0 { None } else { Errno::from_io_error(&io::Error::last_os_error()) }
}

fn restrict(paths: &Paths<'_>) -> io::Result<RestrictionStatus> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let mut disk = make_bitflags!(AccessFs::{ReadFile | IoctlDev});
    if paths.is_written {
        disk |= make_bitflags!(AccessFs::{WriteFile | Truncate});
    }
    let sockets = make_bitflags!(AccessFs::{MakeSock | RemoveFile});
    let tokens = make_bitflags!(AccessFs::{ReadDir | MakeDir | RemoveDir});
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    let mut ruleset = ruleset.add_rule(PathBeneath::new(paths.disk, disk)).map_err(io::Error::other)?;
    for path in ["/proc", "/sys"] {
        ruleset = allow(ruleset, Path::new(path), read)?;
    }
    for path in &paths.socket_directories {
        ruleset = allow(ruleset, path, sockets)?;
    }
    for path in &paths.token_places {
        ruleset = allow(ruleset, path, tokens)?;
    }
    ruleset.restrict_self().map_err(io::Error::other)
}

/// Allows something beneath a directory, if that is there.
fn allow(ruleset: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> io::Result<RulesetCreated> {
    match PathFd::new(path) {
        Ok(directory) => ruleset.add_rule(PathBeneath::new(directory, access)).map_err(io::Error::other),
        // What is not there cannot be opened either; whoever needs it says so.
        Err(_) => Ok(ruleset),
    }
}
