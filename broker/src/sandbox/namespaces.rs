//! Hiding what the process does not serve: a mount namespace in which only a few directories are, and a network
//! namespace without networks.
//!
//! Landlock forbids to open files, but not to ask for their properties, and io_uring makes sockets behind seccomp's
//! back. A file that has no path in the process's namespace, and a socket of another network namespace, cannot even be
//! named. What is open stays usable: the disk is reached through its descriptor.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, chdir, fork, pivot_root};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{getegid, geteuid};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::SandboxError;
use super::privileges::require_one_thread;

/// Where the new root is mounted until it is the root: the first of these that exists and has none of the directories
/// that stay.
const STAGES: [&str; 6] = ["/usr", "/etc", "/dev", "/var", "/run", "/tmp"];
/// The new root has directories only.
const ROOT_OPTIONS: &str = "size=64k,nr_inodes=1024,mode=0755";

/// Whether the files and networks of the machine are hidden from this process.
#[derive(Debug)]
pub struct Isolation {
    why_not: Option<String>,
}

impl Isolation {
    /// Why the process still sees all files and networks; nothing has changed then. `None`: they are hidden.
    pub fn why_not(&self) -> Option<&str> {
        self.why_not.as_deref()
    }
}

/// Moves this process into a mount namespace with nothing but `/proc`, `/sys`, an empty `/dev/shm` and these directories,
/// which must be absolute, and into a network namespace of its own. The working directory becomes `/`. Open files stay
/// usable.
///
/// Root does this with CAP_SYS_ADMIN. An ordinary user gets a user namespace, if the kernel permits it. There the process
/// sees all other users as the overflow user (65534). A process that needs CAP_IPC_LOCK gets no user namespace, because
/// the kernel honours that capability in the first user namespace only.
///
/// Call this before [`drop_privileges`](super::drop_privileges), and before the process opens a directory that it keeps:
/// `..` of such a directory leads out.
///
/// # Errors
///
/// There are other threads; or the kernel refuses what it permitted to a forked process just before. If the kernel
/// refuses from the start, that is no error: [`Isolation::why_not`].
pub fn isolate(directories: &[PathBuf]) -> Result<Isolation, SandboxError> {
    require_one_thread()?;
    let plan = match Plan::new(directories) {
        Ok(plan) => plan,
        Err(why) => return Ok(Isolation { why_not: Some(why.to_owned()) }),
    };
    // A refusal half-way would leave this process between two roots, so another one tries first.
    let tried = in_fork(|| plan.carry_out()).map_err(SandboxError::system("forking to try namespaces"))?;
    if let Err(why) = tried {
        return Ok(Isolation { why_not: Some(why) });
    }
    let isolated = plan.carry_out().map_err(io::Error::other);
    isolated.map_err(SandboxError::system("entering namespaces")).map(|()| Isolation { why_not: None })
}

struct Plan {
    kept: Vec<PathBuf>,
    stage: &'static str,
    needs_user_namespace: bool,
}

/// What the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
struct Refused {
    step: &'static str,
    source: io::Error,
}

fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Refused {
    move |source| Refused { step, source: source.into() }
}

impl Plan {
    fn new(directories: &[PathBuf]) -> Result<Self, &'static str> {
        let mut kept: Vec<PathBuf> = directories.to_vec();
        kept.extend([PathBuf::from("/proc"), PathBuf::from("/sys")]);
        // A directory comes before those in it.
        kept.sort();
        kept.dedup();
        if kept.iter().any(|path| path == Path::new("/") || !path.is_absolute()) {
            return Err("a socket is in the root directory");
        }
        let is_free = |stage: &&str| Path::new(stage).is_dir() && !kept.iter().any(|path| path.starts_with(stage));
        let stage = STAGES.into_iter().find(is_free).ok_or("no directory to build another root in")?;
        let has = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
        let needs_user_namespace = !has.contains(CapabilitySet::SYS_ADMIN);
        if needs_user_namespace && geteuid().as_raw() == overflow_uid() {
            return Err("in a user namespace all other users would have the number of this user: choose another user");
        }
        let is_limited = getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft != RLIM_INFINITY);
        if needs_user_namespace && has.contains(CapabilitySet::IPC_LOCK) && is_limited {
            return Err("CAP_IPC_LOCK would be lost: raise RLIMIT_MEMLOCK, or add CAP_SYS_ADMIN");
        }
        Ok(Self { kept, stage, needs_user_namespace })
    }

    fn carry_out(&self) -> Result<(), Refused> {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET;
        flags.set(CloneFlags::CLONE_NEWUSER, self.needs_user_namespace);
        unshare(flags).map_err(at("unshare"))?;
        if self.needs_user_namespace {
            // The kernel accepts a map of groups only after this.
            fs::write("/proc/self/setgroups", "deny").map_err(at("user namespace"))?;
            fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")).map_err(at("user namespace"))?;
            fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")).map_err(at("user namespace"))?;
        }
        self.change_root()?;
        if self.needs_user_namespace {
            drop_ipc_lock().map_err(at("capset"))?;
        }
        Ok(())
    }

    fn change_root(&self) -> Result<(), Refused> {
        const NOTHING: Option<&str> = None;
        // Mounts made here must not appear in other namespaces.
        mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING)
            .map_err(at("mount --make-private"))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("tmpfs"), self.stage, Some("tmpfs"), flags, Some(ROOT_OPTIONS)).map_err(at("mount tmpfs"))?;
        for path in self.kept.iter().filter(|path| path.is_dir()) {
            let place = self.place(path)?;
            // Recursive, because a user namespace may not uncover what other mounts hide.
            mount(Some(path), &place, NOTHING, MsFlags::MS_BIND | MsFlags::MS_REC, NOTHING)
                .map_err(at("mount --bind"))?;
        }
        self.place(Path::new("/dev/shm"))?;
        chdir(self.stage).map_err(at("chdir"))?;
        // The old root lies on the new one, until it goes (pivot_root(2)).
        pivot_root(".", ".").map_err(at("pivot_root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(at("umount"))?;
        chdir("/").map_err(at("chdir"))
    }

    /// Makes a directory with the same path in the new root, if it is missing.
    fn place(&self, path: &Path) -> Result<PathBuf, Refused> {
        let place = Path::new(self.stage).join(path.strip_prefix("/").unwrap_or(path));
        DirBuilder::new().recursive(true).mode(0o755).create(&place).map_err(at("mkdir"))?;
        Ok(place)
    }
}

/// The number that a user namespace shows for all users that it does not know.
fn overflow_uid() -> u32 {
    let text = fs::read_to_string("/proc/sys/kernel/overflowuid").unwrap_or_default();
    text.trim().parse().unwrap_or(65534)
}

/// A process has every capability in a user namespace of its own, also CAP_IPC_LOCK. [`super::drop_privileges`] would keep
/// CAP_IPC_LOCK, which has no effect in such a namespace.
fn drop_ipc_lock() -> io::Result<()> {
    let CapabilitySets { effective, permitted, inheritable } = capabilities(None)?;
    let without = |set: CapabilitySet| set.difference(CapabilitySet::IPC_LOCK);
    let sets = CapabilitySets {
        effective: without(effective),
        permitted: without(permitted),
        inheritable: without(inheritable),
    };
    Ok(set_capabilities(None, sets)?)
}

/// Runs `work` in a forked process, and returns what it says on failure.
fn in_fork<E: ToString>(work: impl FnOnce() -> Result<(), E>) -> io::Result<Result<(), String>> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let (mut reader, mut writer) = (File::from(reader), File::from(writer));
    // SAFETY: this process has one thread, so no lock is held that the child would miss. The child ends below.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let message = work().err().map_or(String::new(), |error| error.to_string());
            let status = i32::from(writer.write_all(message.as_bytes()).is_err() || !message.is_empty());
            // SAFETY: this ends the child without running what the parent's exit runs.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let mut message = String::new();
            reader.read_to_string(&mut message)?;
            let status = waitpid(child, None)?;
            let has_worked = status == nix::sys::wait::WaitStatus::Exited(child, 0);
            Ok(if has_worked { Ok(()) } else { Err(if message.is_empty() { format!("{status:?}") } else { message }) })
        }
    }
}
