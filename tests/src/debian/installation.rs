//! A Debian in a directory: some packages and everything that they depend on. Tests run their programs there.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use rustix::process::geteuid;

use super::{apt::Apt, cache::Cache};
use crate::needs::{Need, find_program};

/// The directories at which callers mount directories of this machine.
const MOUNT_POINTS: [&str; 2] = ["src", "target"];
/// Programs, and the names that scripts of packages give them (update-alternatives(1)).
const ALTERNATIVES: [(&str, &str); 2] = [("gcc", "cc"), ("mawk", "awk")];
/// A script. Its arguments are the root directory, pairs of a directory and its mount point, `--`, and a command. It
/// mounts the installation itself read-only, so that it never changes.
const ENTER: &str = r#"
set -e
root=$1
shift
mount --rbind "$root" "$root"
mount -o remount,bind,ro "$root"
for name in dev proc sys; do
    mount --rbind "/$name" "$root/$name"
done
while [ "$1" != -- ]; do
    mount --rbind "$1" "$root$2"
    shift 2
done
shift
exec chroot "$root" "$@"
"#;

/// The files of some packages of one release, and of everything that they depend on (without what they only recommend).
#[derive(Debug)]
pub struct Installation {
    root: PathBuf,
}

impl Installation {
    /// What [`of`](Self::of) and [`command`](Self::command) need of the machine. The first time they need the network too.
    pub fn needs() -> Vec<Need> {
        let programs = [
            ("apt-get", "apt"),
            ("dpkg", "dpkg"),
            ("unshare", "util-linux"),
            ("mount", "mount"),
            ("chroot", "coreutils"),
        ];
        let namespaces = Need::new("mounts of its own", || {
            let output = unshare().arg("true").output().context("cannot start unshare")?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
            Ok(())
        });
        programs.map(|(program, package)| Need::program(program, package)).into_iter().chain([namespaces]).collect()
    }

    /// The packages from `suite` of Debian, which are downloaded and unpacked if they are not in the cache.
    ///
    /// # Errors
    ///
    /// The cache cannot be used, or a package cannot be downloaded or unpacked.
    pub fn of(suite: &str, packages: &[&str]) -> Result<Self> {
        let cache = Cache::open()?;
        let mut hasher = DefaultHasher::new();
        (packages, MOUNT_POINTS).hash(&mut hasher);
        let key = format!("debian-{suite}-{:016x}", hasher.finish());
        let known = || cache.recall(&key).and_then(|name| cache.find(&name));
        if let Some(root) = known() {
            return Ok(Self { root });
        }
        let _lock = cache.lock()?;
        if let Some(root) = known() {
            return Ok(Self { root });
        }
        eprintln!("unpacking {} of Debian's {suite}, once", packages.join(", "));
        let directory = tempfile::tempdir().context("cannot make a directory for apt")?;
        let apt = Apt::of_release(directory.path(), suite)?;
        let first = packages.first().context("an installation has packages")?;
        let name = format!("{key}-{first}-{}", apt.version(first)?);
        let root = cache.entry(&name, |root| {
            // The packages of every Debian, by apt's pattern (apt-patterns(7)).
            apt.unpack_with_dependencies(&[&["?essential"], packages].concat(), root)?;
            finish(root)
        })?;
        cache.remember(&key, &name)?;
        Ok(Self { root })
    }

    /// A command whose root directory is the installation. It sees the devices and processes of this machine, and each directory of
    /// `mounts` at the place beside it: `/src`, `/target`, or a place within these.
    pub fn command(&self, mounts: &[(&Path, &str)], program: &str) -> Command {
        let mut command = unshare();
        command.args(["sh", "-c", ENTER, "sh"]).arg(&self.root);
        for (directory, place) in mounts {
            command.arg(directory).arg(place);
        }
        command.args(["--", program]);
        // The path has `mount` and `chroot` of this machine, and then the programs of the installation.
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }
}

/// Does what the programs need of the packages' scripts, which do not run.
fn finish(root: &Path) -> Result<()> {
    for directory in MOUNT_POINTS.iter().chain(["dev", "proc", "sys"].iter()) {
        fs::create_dir_all(root.join(directory)).with_context(|| format!("cannot make /{directory}"))?;
    }
    for (program, other_name) in ALTERNATIVES {
        let (program, place) = (Path::new(program), root.join("usr/bin").join(other_name));
        if root.join("usr/bin").join(program).exists() && !place.exists() {
            symlink(program, place).with_context(|| format!("cannot make {other_name}"))?;
        }
    }
    Ok(())
}

/// A command that runs a program with mounts of its own. A user who is not root becomes root in a namespace for that.
fn unshare() -> Command {
    let mut command = Command::new(find_program("unshare").unwrap_or_else(|| "unshare".into()));
    command.arg("--mount");
    if !geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command
}
