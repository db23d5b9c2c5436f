//! The kernel and the initramfs of a Linux guest, made from Debian packages and kept in a cache.
//!
//! The tests unpack the packages and install nothing. The programs of the guest are busybox, fio (built statically from
//! its source package, because Debian's own is linked with dozens of libraries) and a few programs of this machine with
//! their libraries. The guest has only the initramfs: if it loaded its programs from a disk under test, a fault of the
//! disk would break both.

mod block_driver;
mod cpio;
mod fio;
mod kernel;
mod modules;

use std::{
    ffi::OsStr,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use cpio::Archive;

pub use block_driver::BlockDriver;
pub use kernel::KernelSeries;

use crate::debian::{
    apt::{self, Apt},
    cache::Cache,
    lazy_apt::LazyApt,
};
use crate::needs::{Need, find_program};

/// Programs of this machine for the guest, and their packages.
const HOST_PROGRAMS: [(&str, &str); 3] =
    [("mke2fs", "e2fsprogs"), ("e2fsck", "e2fsprogs"), ("blkdiscard", "util-linux")];
/// Programs that make the image, and their packages.
const BUILD_PROGRAMS: [(&str, &str); 5] =
    [("apt-get", "apt"), ("dpkg", "dpkg"), ("gcc", "gcc"), ("make", "make"), ("tar", "tar")];

const INIT: &str = include_str!("init.sh");
const AGENT: &str = include_str!("agent.sh");
const LOAD_MODULE: &str = include_str!("load-module.sh");

/// A kernel and an initramfs that belong together.
#[derive(Clone, Debug)]
pub struct GuestImage {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl GuestImage {
    /// What [`of`](Self::of) needs of the machine. The network is needed too, the first time.
    pub fn needs() -> Vec<Need> {
        let programs = HOST_PROGRAMS.into_iter().chain(BUILD_PROGRAMS);
        let architecture = Need::new("an x86-64 machine", || {
            ensure!(
                cfg!(target_arch = "x86_64"),
                "the guest's kernel is for x86-64, and its programs are this machine's"
            );
            Ok(())
        });
        [architecture].into_iter().chain(programs.map(|(program, package)| Need::program(program, package))).collect()
    }

    /// The image with the newest kernel of a series. If it is not in the cache, this makes it, which takes about half a
    /// minute.
    ///
    /// # Errors
    ///
    /// A package cannot be downloaded, or something cannot be built.
    pub fn of(series: KernelSeries) -> Result<Self> {
        let cache = Cache::open()?;
        if let Some(image) = Self::find(&cache, series)? {
            return Ok(image);
        }
        let _lock = cache.lock()?;
        if let Some(image) = Self::find(&cache, series)? {
            return Ok(image);
        }
        eprintln!("making the image of a Linux {series} guest, once");
        Self::make(&cache, series).with_context(|| format!("cannot make the image of a Linux {series} guest"))
    }

    /// The kernel that QEMU loads.
    pub(super) fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The initramfs that QEMU loads.
    pub(super) fn initramfs(&self) -> &Path {
        &self.initramfs
    }

    /// The initramfs with further programs in `/sbin` and another block driver: an archive behind the image's own. The
    /// kernel unpacks both.
    ///
    /// # Errors
    ///
    /// A file cannot be read.
    pub(super) fn initramfs_with(&self, programs: &[PathBuf], driver: Option<&BlockDriver>) -> Result<Vec<u8>> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let mut archive = Archive::default();
        for program in programs {
            let name = program.file_name().and_then(OsStr::to_str).context("a program's name")?;
            archive.file(&format!("/sbin/{name}"), 0o755, &read(program)?)?;
        }
        if let Some(driver) = driver {
            let name = driver.name();
            archive.file(&format!("/lib/modules/{name}.ko"), 0o644, &read(driver.module())?)?;
            // What it needs is loaded: virtio_pci needs the same.
            archive.file(&format!("/lib/modules/{name}.order"), 0o644, format!("{name}\n").as_bytes())?;
        }
        let mut initramfs = read(&self.initramfs)?;
        initramfs.extend(archive.finish());
        Ok(initramfs)
    }

    fn find(cache: &Cache, series: KernelSeries) -> Result<Option<Self>> {
        let known = ["busybox", "fio", &kernel::key(series)].map(|key| known(cache, key));
        let [Some(busybox), Some(fio), Some(linux)] = &known else { return Ok(None) };
        let initramfs = cache.find(&initramfs_name([busybox, fio, linux])?);
        Ok(initramfs.map(|initramfs| Self::in_directories(linux, &initramfs)))
    }

    fn in_directories(linux: &Path, initramfs: &Path) -> Self {
        Self { kernel: linux.join("vmlinuz"), initramfs: initramfs.join("initramfs.cpio") }
    }

    fn make(cache: &Cache, series: KernelSeries) -> Result<Self> {
        let apt = LazyApt::default();
        let busybox = entry(cache, "busybox", || {
            let apt = apt.get()?;
            let name = format!("busybox-{}", apt.version("busybox-static")?);
            cache.entry(&name, |entry| unpack_busybox(apt, entry))
        })?;
        let fio = entry(cache, "fio", || {
            let apt = apt.get()?;
            let name = format!("fio-{}", apt.version("fio")?);
            eprintln!("building fio from Debian's sources, once");
            cache.entry(&name, |entry| fio::build(apt, &entry.join("fio")))
        })?;
        let busybox_program = busybox.join("busybox");
        let linux = entry(cache, &kernel::key(series), || kernel::make(cache, series, &apt, &busybox_program))?;
        let initramfs = cache.entry(&initramfs_name([&busybox, &fio, &linux])?, |entry| {
            let archive = initramfs(&busybox_program, &fio.join("fio"), &linux)?;
            fs::write(entry.join("initramfs.cpio"), archive).context("cannot write the initramfs")
        })?;
        Ok(Self::in_directories(&linux, &initramfs))
    }
}

/// The entry that the cache remembers under `key`: the newest version when the cache was filled.
fn known(cache: &Cache, key: &str) -> Option<PathBuf> {
    cache.find(&cache.recall(key)?)
}

/// The entry that the cache remembers under `key`. If there is none, `make` makes it, and the cache remembers it.
fn entry(cache: &Cache, key: &str, make: impl FnOnce() -> Result<PathBuf>) -> Result<PathBuf> {
    if let Some(path) = known(cache, key) {
        return Ok(path);
    }
    let path = make()?;
    let name = path.file_name().and_then(OsStr::to_str).context("a cache entry has a name")?;
    cache.remember(key, name)?;
    Ok(path)
}

/// The answer to a question about this machine. It is computed once in each boot of the machine.
pub(super) fn remembered_per_boot(question: &str, answer: impl FnOnce() -> Result<String>) -> Result<String> {
    let cache = Cache::open()?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("cannot read the id of this boot")?;
    let key = format!("{question}-{}", boot.trim());
    if let Some(found) = cache.recall(&key) {
        return Ok(found);
    }
    let _lock = cache.lock()?;
    if let Some(found) = cache.recall(&key) {
        return Ok(found);
    }
    let answer = answer()?;
    cache.remember(&key, &answer)?;
    Ok(answer)
}

/// A hash that is the same in all processes of one build.
fn hash_of(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// A name that changes with every input of the initramfs.
fn initramfs_name(parts: [&Path; 3]) -> Result<String> {
    let programs = HOST_PROGRAMS.map(|(name, package)| {
        let program = find_program(name).with_context(|| format!("there is no {name}: apt-get install {package}"))?;
        let metadata = fs::metadata(&program).with_context(|| format!("cannot look at {}", program.display()))?;
        Ok((metadata.size(), metadata.mtime()))
    });
    let programs = programs.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(format!("initramfs-{:016x}", hash_of((parts, INIT, AGENT, LOAD_MODULE, programs))))
}

fn unpack_busybox(apt: &Apt, entry: &Path) -> Result<()> {
    let unpacked = tempfile::tempdir().context("cannot make a directory for busybox")?;
    apt.unpack("busybox-static", unpacked.path())?;
    let places = ["bin/busybox", "usr/bin/busybox"].map(|place| unpacked.path().join(place));
    let program = places.iter().find(|path| path.exists()).context("the package has no busybox")?;
    fs::copy(program, entry.join("busybox")).context("cannot copy busybox")?;
    Ok(())
}

fn initramfs(busybox: &Path, fio: &Path, linux: &Path) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut archive = Archive::default();
    for directory in ["/proc", "/sys", "/tmp", "/dev"] {
        archive.directory(directory)?;
    }
    // The kernel opens this node before the first program runs. That program then mounts devtmpfs over it.
    archive.character_device("/dev/console", 5, 1)?;
    archive.file("/init", 0o755, INIT.as_bytes())?;
    archive.file("/sbin/agent", 0o755, AGENT.as_bytes())?;
    archive.file("/sbin/load-module", 0o755, LOAD_MODULE.as_bytes())?;

    archive.file("/bin/busybox", 0o755, &read(busybox)?)?;
    let applets = apt::run(Command::new(busybox).arg("--list"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        archive.symlink(&format!("/bin/{applet}"), "busybox")?;
    }
    archive.file("/sbin/fio", 0o755, &read(fio)?)?;
    add_host_programs(&mut archive)?;
    for entry in fs::read_dir(linux.join("modules")).context("cannot read the modules")? {
        let path = entry?.path();
        let name = path.file_name().and_then(OsStr::to_str).context("a module's name")?;
        archive.file(&format!("/lib/modules/{name}"), 0o644, &read(&path)?)?;
    }
    Ok(archive.finish())
}

/// Programs of this machine in `/sbin`, with their libraries where the programs look for them.
fn add_host_programs(archive: &mut Archive) -> Result<()> {
    let mut libraries = Vec::new();
    let mut functions = String::new();
    for (name, package) in HOST_PROGRAMS {
        let program = find_program(name).with_context(|| format!("there is no {name}: apt-get install {package}"))?;
        functions.push_str(&format!("{name}() {{ /sbin/{name} \"$@\"; }}\n"));
        archive.file(&format!("/sbin/{name}"), 0o755, &fs::read(&program).context("cannot read a program")?)?;
        libraries.extend(libraries_in(&apt::run(Command::new("ldd").arg(&program))?));
    }
    libraries.sort();
    libraries.dedup();
    for library in libraries {
        let content = fs::read(&library).with_context(|| format!("cannot read {library}"))?;
        archive.file(&library, 0o755, &content)?;
    }
    archive.symlink("/sbin/mkfs.ext4", "mke2fs")?;
    // Busybox's shell prefers its own program of a name to one in PATH, and prefers a function to both.
    archive.file("/etc/functions", 0o644, functions.as_bytes())
}

/// The paths in what ldd(1) prints: `NAME => PATH (ADDRESS)` and, for the dynamic linker, `PATH (ADDRESS)`.
fn libraries_in(ldd: &str) -> Vec<String> {
    let path = |line: &str| {
        let place = line.split_once("=>").map_or(line, |(_, place)| place).trim();
        let path = place.split_once(" (").map_or(place, |(path, _)| path);
        path.starts_with('/').then(|| path.to_owned())
    };
    ldd.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_in_finds_the_libraries_and_the_dynamic_linker() {
        let text = "\tlinux-vdso.so.1 (0x00007efd)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007efd)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007efd)\n";
        assert_eq!(libraries_in(text), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert_eq!(libraries_in("\tstatically linked\n"), [""; 0]);
    }

    #[test]
    fn another_kernel_or_program_gives_another_initramfs() {
        let [busybox, fio, old, new] = ["busybox-1", "fio-3", "linux-1", "linux-2"].map(Path::new);
        let name = |linux| initramfs_name([busybox, fio, linux]).expect("the programs of e2fsprogs and util-linux");
        assert_eq!(name(old), name(old));
        assert_ne!(name(old), name(new));
    }
}
