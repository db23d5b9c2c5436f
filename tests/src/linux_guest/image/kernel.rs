//! The kernels of guests: which packages of Debian have them, and what of these packages a guest needs.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::{hash_of, modules::ModuleTree};
use crate::debian::{apt::Apt, cache::Cache, lazy_apt::LazyApt};

/// The modules that a guest can load. It loads the first two when it boots.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_blk", "virtio_balloon", "virtio_mem", "null_blk"];
/// The end of the names of packages with a kernel for virtual machines.
const FLAVOUR: &str = "-cloud-amd64";
/// The names of the packages with a kernel, without the release: up to Debian 13 one package has the modules too, later
/// not.
const WHOLE: (&str, &str) = ("linux-image-", "-unsigned");
const IN_PARTS: &str = "linux-binary-unsigned-";
/// The other parts: the list of what is built in, and the modules.
const OTHER_PARTS: [&str; 2] = ["linux-base-", "linux-modules-"];

/// A series of Debian's kernels for virtual machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KernelSeries {
    /// The series of Debian 13. Debian 12 has it too.
    Linux6_12,
    /// Debian 12.
    Linux6_1,
    /// The newest kernel in Debian, which is in its release sid.
    Newest,
}

impl KernelSeries {
    /// Every series.
    pub const ALL: [Self; 3] = [Self::Linux6_1, Self::Linux6_12, Self::Newest];

    /// A release of Debian that has the series.
    pub(super) fn suite(self) -> &'static str {
        match self {
            Self::Linux6_12 => "trixie",
            Self::Linux6_1 => "bookworm",
            Self::Newest => "sid",
        }
    }

    /// The repositories with the series: those of this machine, if they have it.
    ///
    /// # Errors
    ///
    /// There is no apt.
    pub(super) fn repositories<'a>(self, machine: &'a LazyApt, release: &'a LazyApt) -> Result<&'a Apt> {
        if self != Self::Newest && self.packages(machine.get()?).is_ok() {
            return machine.get();
        }
        release.get()
    }

    /// The packages of the newest kernel of the series. The first has the kernel itself.
    fn packages(self, apt: &Apt) -> Result<Vec<String>> {
        if self != Self::Newest {
            let (prefix, suffix) = WHOLE;
            return Ok(vec![apt.newest_named(&format!("{prefix}{self}."), &format!("{FLAVOUR}{suffix}"))?]);
        }
        let kernel = apt.newest_named(IN_PARTS, FLAVOUR)?;
        let release = release_of(&kernel).context("the name has a release")?.to_owned();
        let others = OTHER_PARTS.map(|part| format!("{part}{release}"));
        Ok([kernel].into_iter().chain(others).collect())
    }
}

impl fmt::Display for KernelSeries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linux6_12 => "6.12",
            Self::Linux6_1 => "6.1",
            Self::Newest => "newest",
        })
    }
}

/// The release of a kernel (`uname -r`) in the name of its package, or of its entry in the cache:
/// `6.1.0-57-cloud-amd64`.
pub(super) fn release_of(name: &str) -> Option<&str> {
    let release = name.strip_prefix(IN_PARTS).or_else(|| name.strip_prefix(WHOLE.0))?;
    Some(&release[..release.find(FLAVOUR)? + FLAVOUR.len()])
}

/// The key of a kernel's entry. The entry has the modules too, so other modules make another entry.
pub(super) fn key(series: KernelSeries) -> String {
    format!("linux-{series}-{:016x}", hash_of(MODULES))
}

/// The entry with the newest kernel of a series. `machine` has the repositories of this machine.
pub(super) fn make(cache: &Cache, series: KernelSeries, machine: &LazyApt, busybox: &Path) -> Result<PathBuf> {
    let release = LazyApt::of_release(series.suite());
    let apt = series.repositories(machine, &release)?;
    let packages = series.packages(apt)?;
    let package = packages.first().context("a kernel has a package")?;
    eprintln!("unpacking {package}, once");
    let name = format!("{package}-{}-{:016x}", apt.version(package)?, hash_of(MODULES));
    cache.entry(&name, |entry| unpack(apt, &packages, busybox, entry))
}

/// Unpacks the kernel and the modules, each module with a list of the modules to load before it.
fn unpack(apt: &Apt, packages: &[String], busybox: &Path, entry: &Path) -> Result<()> {
    let unpacked = tempfile::tempdir_in(entry).context("cannot make a directory for the kernel")?;
    for package in packages {
        apt.unpack(package, unpacked.path())?;
    }
    let release = ["lib/modules", "usr/lib/modules"]
        .iter()
        .find_map(|directory| only_entry(&unpacked.path().join(directory), "").ok())
        .context("the packages have no modules")?;
    let kernel = only_entry(&unpacked.path().join("boot"), "vmlinuz-").or_else(|_| only_entry(&release, "vmlinuz"))?;
    fs::copy(kernel, entry.join("vmlinuz")).context("cannot copy the kernel")?;
    let tree = ModuleTree::new(&release, busybox)?;
    let modules = entry.join("modules");
    fs::create_dir(&modules).context("cannot make a directory for modules")?;
    for name in MODULES {
        let mut order = String::new();
        for module in tree.load_order(name)? {
            order.push_str(&module.name);
            order.push('\n');
            fs::write(modules.join(format!("{}.ko", module.name)), module.object).context("cannot write a module")?;
        }
        fs::write(modules.join(format!("{name}.order")), order).context("cannot write the order of modules")?;
    }
    Ok(())
}

fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let is_it =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes()));
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(is_it)
        .with_context(|| format!("{} has no {prefix}*", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_of_reads_the_names_of_packages_and_of_cache_entries() {
        for (name, release) in [
            ("linux-image-6.1.0-57-cloud-amd64-unsigned-6.1.192-3-9dc605bd4e3116e7", "6.1.0-57-cloud-amd64"),
            ("linux-image-6.12.117+deb12-cloud-amd64-unsigned", "6.12.117+deb12-cloud-amd64"),
            ("linux-binary-unsigned-7.2.13+deb14-cloud-amd64-7.2.13-1-9dc6", "7.2.13+deb14-cloud-amd64"),
        ] {
            assert_eq!(release_of(name), Some(release));
        }
        assert_eq!(release_of("linux-image-6.1.0-57-amd64"), None);
        assert_eq!(release_of("busybox-1"), None);
    }
}
