//! The repository's own block driver, built for the kernel of a guest.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::{GuestImage, KernelSeries, hash_of, kernel, known};
use crate::{
    debian::{
        Installation,
        apt::{Apt, run},
        cache::Cache,
        lazy_apt::LazyApt,
    },
    needs::Need,
};

/// The sources of the driver, and the header that they share with the rest of the repository.
const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-driver/linux");
const ABI_HEADER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-abi/include/ringpass_abi.h");
/// The name of the module.
const MODULE: &str = "ringpass_blk";

/// The repository's virtio-blk driver as a module, which a guest can load instead of its own.
#[derive(Clone, Debug)]
pub struct BlockDriver {
    module: PathBuf,
    warnings: String,
}

impl BlockDriver {
    /// What [`of`](Self::of) needs of the machine, besides what [`GuestImage`] needs.
    pub fn needs(series: KernelSeries) -> Vec<Need> {
        if series == KernelSeries::Newest { Installation::needs() } else { Vec::new() }
    }

    /// The module for the kernel of a series. If it is not in the cache, this builds it, with the kernel's headers from Debian.
    ///
    /// # Errors
    ///
    /// The headers cannot be downloaded, or the module does not build.
    pub fn of(series: KernelSeries) -> Result<Self> {
        // The guest's image says which kernel it is.
        GuestImage::of(series)?;
        let cache = Cache::open()?;
        let linux = known(&cache, &kernel::key(series)).context("the cache has no kernel")?;
        let name = linux.file_name().and_then(OsStr::to_str).context("a kernel's entry has a name")?;
        let release = kernel::release_of(name).with_context(|| format!("{name:?} is not named after a kernel"))?;
        let sources = sources()?;
        let name = format!("{MODULE}-{release}-{:016x}", hash_of(&sources));
        if let Some(entry) = cache.find(&name) {
            return Self::at(&entry);
        }
        let kit = Kit::of(&cache, series, release)?;
        let _lock = cache.lock()?;
        let entry = cache.entry(&name, |entry| {
            eprintln!("building the block driver for Linux {release}");
            build(&kit, &sources, entry).with_context(|| format!("cannot build the driver for {release}"))
        })?;
        Self::at(&entry)
    }

    /// The module for a kernel with these headers, such as `/lib/modules/RELEASE/build`. `directory` gets the module.
    ///
    /// # Errors
    ///
    /// The module does not build.
    pub fn with_headers(headers: &Path, directory: &Path) -> Result<Self> {
        let kit = Kit::Unpacked { headers: headers.to_owned(), common: None };
        build(&kit, &sources()?, directory)
            .with_context(|| format!("cannot build the driver with {}", headers.display()))?;
        Self::at(directory)
    }

    fn at(entry: &Path) -> Result<Self> {
        let warnings = fs::read_to_string(entry.join("warnings")).context("cannot read the compiler's warnings")?;
        Ok(Self { module: entry.join(format!("{MODULE}.ko")), warnings })
    }

    /// The name of the module in the guest.
    pub fn name(&self) -> &'static str {
        MODULE
    }

    /// What the compiler has said against the sources (with the warnings of `W=1`).
    pub fn warnings(&self) -> &str {
        &self.warnings
    }

    /// The object file.
    pub(in crate::linux_guest) fn module(&self) -> &Path {
        &self.module
    }
}

/// The names and contents of all files that make the module.
fn sources() -> Result<Vec<(String, String)>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(SOURCES).with_context(|| format!("cannot read {SOURCES}"))? {
        let path = entry?.path();
        let name = path.file_name().and_then(OsStr::to_str).context("a name in UTF-8")?.to_owned();
        let is_source = name.ends_with(".mod.c");
        if !is_source && (name == "Kbuild" || name.ends_with(".c") || name.ends_with(".h")) {
            sources.push((name, fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?));
        }
    }
    let header = fs::read_to_string(ABI_HEADER).with_context(|| format!("cannot read {ABI_HEADER}"))?;
    sources.push(("ringpass_abi.h".to_owned(), header));
    sources.sort();
    Ok(sources)
}

/// What builds a module.
enum Kit {
    /// The headers of a kernel, for the compiler of this machine.
    Unpacked {
        /// The directory with what belongs to one architecture.
        headers: PathBuf,
        /// The directory with the rest of Debian's headers, which the makefile names by an absolute path.
        common: Option<PathBuf>,
    },
    /// Headers and compiler of a release of Debian. The newest kernel takes options that older compilers do not know, and
    /// its tools need a newer C library.
    Installed { installation: Installation, release: String },
}

/// Where [`Kit::Installed`] sees the directory of the sources.
const PLACE: &str = "/src";

impl Kit {
    /// The kit for a kernel of Debian. It is downloaded if the cache does not have it.
    fn of(cache: &Cache, series: KernelSeries, release: &str) -> Result<Self> {
        let package = format!("linux-headers-{release}");
        let kit = if series == KernelSeries::Newest {
            Installation::of(series.suite(), &[package.as_str(), "gcc", "make"])
                .map(|installation| Self::Installed { installation, release: release.to_owned() })
        } else {
            Self::unpacked(cache, series, &package)
        };
        kit.with_context(|| {
            format!("cannot get {package}: if the mirror has only a newer one, remove {}", cache.root().display())
        })
    }

    fn unpacked(cache: &Cache, series: KernelSeries, package: &str) -> Result<Self> {
        let _lock = cache.lock()?;
        let entry = cache.entry(package, |entry| {
            let (machine, release) = (LazyApt::default(), LazyApt::of_release(series.suite()));
            let apt = series.repositories(&machine, &release)?;
            let needed = dependencies(apt, package)?;
            needed.iter().map(String::as_str).chain([package]).try_for_each(|package| apt.unpack(package, entry))
        })?;
        let places = entry.join("usr/src");
        let find = |end: &str| {
            let entries = fs::read_dir(&places).with_context(|| format!("cannot read {}", places.display()))?;
            let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
            let found = paths.find(|path| path.to_string_lossy().ends_with(end));
            found.with_context(|| format!("{} has no *{end}", places.display()))
        };
        Ok(Self::Unpacked { headers: find("-cloud-amd64")?, common: Some(find("-common")?) })
    }

    /// A command that runs in the directory of the sources.
    fn command(&self, program: &str, sources: &Path) -> Command {
        match self {
            Self::Unpacked { .. } => {
                let mut command = Command::new(program);
                command.current_dir(sources);
                command
            }
            Self::Installed { installation, .. } => {
                let mut command = installation.command(&[(sources, PLACE)], "env");
                command.args(["--chdir", PLACE, program]);
                command
            }
        }
    }

    /// The command that builds the modules in a directory.
    fn make(&self, sources: &Path) -> Command {
        let mut make = self.command("make", sources);
        let place = match self {
            Self::Unpacked { headers, common } => {
                make.arg("-C").arg(headers);
                if let Some(common) = common {
                    make.arg("-f").arg(common.join("Makefile")).arg("CC=gcc");
                }
                sources
            }
            Self::Installed { release, .. } => {
                make.arg("-C").arg(format!("/usr/src/linux-headers-{release}"));
                Path::new(PLACE)
            }
        };
        // Types for BPF would need the program pahole.
        make.arg(format!("M={}", place.display())).args(["W=1", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"]);
        // A make that runs the tests would pass on its own options.
        make.env_remove("MAKEFLAGS");
        make
    }
}

/// The packages with the other parts of the headers.
fn dependencies(apt: &Apt, package: &str) -> Result<Vec<String>> {
    let names = apt.depends(package)?;
    let parts = ["linux-headers-", "linux-kbuild-"];
    let needed: Vec<String> =
        names.into_iter().filter(|name| parts.iter().any(|part| name.starts_with(part))).collect();
    ensure!(needed.len() == 2, "{package} depends on other packages than this knows: {needed:?}");
    Ok(needed)
}

fn build(kit: &Kit, sources: &[(String, String)], entry: &Path) -> Result<()> {
    let directory = tempfile::tempdir().context("cannot make a directory for the module")?;
    for (name, content) in sources {
        fs::write(directory.path().join(name), content).with_context(|| format!("cannot write {name}"))?;
    }
    let output = kit.make(directory.path()).output().context("cannot start make")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "make: {}\n{said}", output.status);
    let of_sources = |line: &&str| line.contains("warning:") && sources.iter().any(|(name, _)| line.contains(name));
    let warnings: Vec<&str> = said.lines().filter(of_sources).collect();
    fs::write(entry.join("warnings"), warnings.join("\n")).context("cannot write the warnings")?;
    let module = format!("{MODULE}.ko");
    run(kit.command("strip", directory.path()).args(["--strip-debug", &module])).context("cannot strip the module")?;
    fs::copy(directory.path().join(&module), entry.join(&module)).context("cannot copy the module").map(drop)
}
