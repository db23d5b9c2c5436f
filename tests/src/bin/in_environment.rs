//! Runs a program in another environment: `in_environment WORD... -- PROGRAM ARGUMENT...`. Each word removes something,
//! in their order. Then the program replaces this one.

use std::{
    collections::BTreeMap,
    env, fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use nix::{
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, setrlimit},
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

/// The user `nobody`, and its group.
const NOBODY: u32 = 65534;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let end = arguments.iter().position(|word| word == "--").context("no `--` before the program")?;
    let (words, program) = (&arguments[..end], &arguments[end + 1..]);
    let (name, rest) = program.split_first().context("no program")?;
    let mut command = Command::new(name);
    command.args(rest);
    for word in words {
        let (kind, value) = word.split_once('=').unwrap_or((word, ""));
        enter(kind, value, &mut command).with_context(|| word.clone())?;
    }
    Err(command.exec()).context(name.clone())
}

fn enter(kind: &str, value: &str, command: &mut Command) -> Result<()> {
    match kind {
        "user-namespace" => user_namespace(),
        // Unmounts the directory.
        "without" => {
            own_mounts()?;
            Ok(umount2(value, MntFlags::MNT_DETACH)?)
        }
        // Mounts one directory at another: VALUE is FROM:TO.
        "bind" => {
            own_mounts()?;
            let (from, to) = value.split_once(':').context("not FROM:TO")?;
            Ok(mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
        }
        // Makes all file systems read-only, except one directory.
        "read-only-but" => read_only_but(Path::new(value)),
        "memlock" => limit(Resource::RLIMIT_MEMLOCK, value),
        "nofile" => limit(Resource::RLIMIT_NOFILE, value),
        "nobody" => {
            command.uid(NOBODY).gid(NOBODY);
            Ok(())
        }
        // VALUE is CALL:ERROR.
        "filter" => {
            let (call, error) = value.split_once(':').context("not CALL:ERROR")?;
            filter(call, error)
        }
        _ => bail!("unknown"),
    }
}

/// Enters a user namespace in which this user is root.
fn user_namespace() -> Result<()> {
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    unshare(CloneFlags::CLONE_NEWUSER)?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    Ok(fs::write("/proc/self/gid_map", format!("0 {group} 1"))?)
}

/// Makes later mounts visible only to this process.
fn own_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    Ok(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?)
}

fn read_only_but(directory: &Path) -> Result<()> {
    own_mounts()?;
    mount(Some(directory), directory, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    // Everything beneath the new mount becomes read-only.
    if env::current_dir()? == directory {
        env::set_current_dir(directory)?;
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for point in mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from) {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        // No path leads to a mount under another one, so it need not change.
        if point != directory && mount(None::<&str>, &point, None::<&str>, flags, None::<&str>).is_err() {
            eprintln!("in_environment: {} stays writable", point.display());
        }
    }
    Ok(())
}

fn limit(resource: Resource, value: &str) -> Result<()> {
    let value = value.parse()?;
    Ok(setrlimit(resource, value, value)?)
}

/// Makes the system call fail from now on.
fn filter(call: &str, error: &str) -> Result<()> {
    let number = match call {
        "io_uring_setup" => libc::SYS_io_uring_setup,
        "io_uring_enter" => libc::SYS_io_uring_enter,
        "io_uring_register" => libc::SYS_io_uring_register,
        _ => bail!("unknown call"),
    };
    let errno = match error {
        "EPERM" => libc::EPERM,
        "ENOSYS" => libc::ENOSYS,
        _ => bail!("unknown error"),
    };
    let rules = BTreeMap::from([(number, Vec::new())]);
    let action = SeccompAction::Errno(u32::try_from(errno)?);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, env::consts::ARCH.try_into()?)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(apply_filter(&program)?)
}
