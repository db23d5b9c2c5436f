//! Small C programs for guests, linked statically: what busybox and fio cannot do.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use super::{
    LinuxGuestConfig,
    image::{BlockDriver, GuestImage},
};
use crate::debian::apt::run;

const KEXEC: &str = include_str!("kexec.c");
const SCATTERED_IO: &str = include_str!("scattered-io.c");

/// Programs for [`LinuxGuestConfig::programs`]. The drop removes them.
#[derive(Debug)]
pub struct Programs {
    directory: tempfile::TempDir,
}

impl Programs {
    /// Compiles all programs, which takes less than a second.
    ///
    /// # Errors
    ///
    /// There is no compiler, or no static C library.
    pub fn build() -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a directory for programs")?;
        for (name, source) in [("kexec", KEXEC), ("scattered-io", SCATTERED_IO)] {
            let program = directory.path().join(name);
            let file = program.with_extension("c");
            fs::write(&file, source).context("cannot write a source")?;
            let mut gcc = Command::new("gcc");
            gcc.args(["-static", "-O1", "-Wall", "-Werror", "-o"]).arg(&program).arg(&file);
            run(&mut gcc).with_context(|| format!("cannot compile {name}"))?;
        }
        Ok(Self { directory })
    }

    /// `kexec KERNEL INITRAMFS`: executes another kernel, with the command line of the running one.
    pub fn kexec(&self) -> PathBuf {
        self.directory.path().join("kexec")
    }

    /// `scattered-io DISK OFFSET_BYTES LENGTH_BYTES ROUNDS SEED`: writes and reads with direct I/O from memory in many
    /// small pieces, at random places of this part of the disk, and compares.
    pub fn scattered_io(&self) -> PathBuf {
        self.directory.path().join("scattered-io")
    }
}

/// The kernel and the initramfs that a guest boots, for a kexec in that guest.
///
/// # Errors
///
/// The image cannot be made.
pub fn boot_files(config: &LinuxGuestConfig) -> Result<(Vec<u8>, Vec<u8>)> {
    let image = GuestImage::of(config.kernel)?;
    let kernel = fs::read(image.kernel()).context("cannot read the kernel")?;
    let driver = BlockDriver::of(config.kernel)?;
    Ok((kernel, image.initramfs_with(&config.programs, Some(&driver))?))
}
