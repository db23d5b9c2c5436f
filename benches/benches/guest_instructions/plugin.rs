//! The plugin of QEMU that counts instructions.

use std::{
    collections::HashMap,
    io::Read,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

const PROGRAM: &str = "qemu-system-x86_64";

/// The plugin's library.
#[derive(Debug)]
pub(crate) struct Plugin {
    library: PathBuf,
}

/// The plugin in one QEMU.
#[derive(Debug)]
pub(crate) struct Counter {
    library: PathBuf,
    directory: tempfile::TempDir,
}

/// The instructions executed so far, by the address of their block.
pub(crate) type Counts = HashMap<u64, u64>;

impl Plugin {
    /// Builds the plugin for the QEMU of this machine.
    pub(crate) fn build() -> Result<Self> {
        let version = if qemu_major()? < 9 { "1" } else { "2" };
        let library = ringpass_benches::build(
            &["--package", "ringpass-instruction-count"],
            &[("RINGPASS_QEMU_PLUGIN_VERSION", version)],
            "libringpass_instruction_count.so",
        )?;
        Ok(Self { library })
    }

    pub(crate) fn counter(&self) -> Result<Counter> {
        let directory = tempfile::tempdir().context("cannot make a directory for a socket")?;
        Ok(Counter { library: self.library.clone(), directory })
    }
}

/// The first number of QEMU's version.
fn qemu_major() -> Result<u32> {
    let output = Command::new(PROGRAM).arg("--version").output().context("cannot start qemu-system-x86_64")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = text.split_once("version ").and_then(|(_, version)| version.split_once('.'));
    number.and_then(|(major, _)| major.parse().ok()).with_context(|| format!("QEMU says this of its version: {text}"))
}

impl Counter {
    fn socket(&self) -> PathBuf {
        self.directory.path().join("counts")
    }

    /// The value of QEMU's `-plugin`.
    pub(crate) fn option(&self) -> String {
        let value = |path: &Path| path.to_string_lossy().replace(',', ",,");
        format!("{},socket={}", value(&self.library), value(&self.socket()))
    }

    /// What was counted since QEMU began.
    pub(crate) fn counts(&self) -> Result<Counts> {
        let mut text = String::new();
        let mut stream = UnixStream::connect(self.socket()).context("QEMU has not loaded the plugin")?;
        stream.read_to_string(&mut text).context("cannot read the counts")?;
        let mut counts = Counts::new();
        for line in text.lines() {
            let numbers = line.split_once(' ').and_then(|(address, executed)| {
                Some((u64::from_str_radix(address, 16).ok()?, executed.parse::<u64>().ok()?))
            });
            let (address, executed) = numbers.with_context(|| format!("a count: {line:?}"))?;
            *counts.entry(address).or_default() += executed;
        }
        Ok(counts)
    }
}
