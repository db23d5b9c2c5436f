//! The repository's own block driver, built for the kernel of a guest.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::{GuestImage, KernelSeries, LazyApt, hash_of, kernel_key, known};
use crate::debian::{
    apt::{Apt, run},
    cache::Cache,
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
    /// The module for the kernel of a series. If it is not in the cache, this builds it, with the kernel's headers from Debian.
    ///
    /// # Errors
    ///
    /// The headers cannot be downloaded, or the module does not build.
    pub fn of(series: KernelSeries) -> Result<Self> {
        // The guest's image says which kernel it is.
        GuestImage::of(series)?;
        let cache = Cache::open()?;
        let linux = known(&cache, &kernel_key(series)).context("the cache has no kernel")?;
        let package = kernel_package(&linux)?;
        let sources = sources()?;
        let name = format!("{MODULE}-{package}-{:016x}", hash_of(&sources));
        let _lock = cache.lock()?;
        let headers = headers(&cache, &package)?;
        let entry = cache.entry(&name, |entry| {
            eprintln!("building the block driver for Linux {series}");
            build(&headers, &sources, entry).with_context(|| format!("cannot build the driver for {package}"))
        })?;
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

/// The name of the kernel's package without its prefix and suffix: `6.1.0-57-cloud-amd64`.
fn kernel_package(linux: &Path) -> Result<String> {
    let name = linux.file_name().and_then(OsStr::to_str).context("a kernel's entry has a name")?;
    let release = name.strip_prefix("linux-image-").and_then(|name| name.split_once("-unsigned"));
    Ok(release.with_context(|| format!("{name:?} is not named after a kernel"))?.0.to_owned())
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

/// The headers of a kernel, in the layout that its packages have below `/`.
fn headers(cache: &Cache, release: &str) -> Result<PathBuf> {
    cache.entry(&format!("linux-headers-{release}"), |entry| {
        let apt = LazyApt::default();
        let apt = apt.get()?;
        let package = format!("linux-headers-{release}");
        let needed = dependencies(apt, &package)?;
        for package in needed.iter().chain([&package]) {
            apt.unpack(package, entry)
                .with_context(|| format!("cannot get {package}: is the cached kernel older than the mirror's?"))?;
        }
        Ok(())
    })
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

fn build(headers: &Path, sources: &[(String, String)], entry: &Path) -> Result<()> {
    let directory = tempfile::tempdir().context("cannot make a directory for the module")?;
    for (name, content) in sources {
        fs::write(directory.path().join(name), content).with_context(|| format!("cannot write {name}"))?;
    }
    let places = headers.join("usr/src");
    let is = |end: &'static str| move |path: &PathBuf| path.to_string_lossy().ends_with(end);
    let find = |end| {
        let entries = fs::read_dir(&places).with_context(|| format!("cannot read {}", places.display()))?;
        let found = entries.filter_map(|entry| Some(entry.ok()?.path())).find(is(end));
        found.with_context(|| format!("{} has no *{end}", places.display()))
    };
    // The makefile of the architecture names that of the common headers by an absolute path.
    let mut make = Command::new("make");
    make.arg("-C").arg(find("-cloud-amd64")?).arg("-f").arg(find("-common")?.join("Makefile"));
    make.arg(format!("M={}", directory.path().display())).args([
        "W=1",
        "CC=gcc",
        "CONFIG_DEBUG_INFO_BTF_MODULES=",
        "modules",
    ]);
    // Types for BPF would need the program pahole.
    // A make that runs the tests would pass on its own options.
    make.env_remove("MAKEFLAGS");
    let output = make.output().context("cannot start make")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "make: {}\n{said}", output.status);
    let of_sources = |line: &&str| line.contains("warning:") && sources.iter().any(|(name, _)| line.contains(name));
    let warnings: Vec<&str> = said.lines().filter(of_sources).collect();
    fs::write(entry.join("warnings"), warnings.join("\n")).context("cannot write the warnings")?;
    let module = format!("{MODULE}.ko");
    let mut strip = Command::new("strip");
    strip.arg("--strip-debug").arg("-o").arg(entry.join(&module)).arg(directory.path().join(&module));
    run(&mut strip).context("cannot strip the module").map(drop)
}
