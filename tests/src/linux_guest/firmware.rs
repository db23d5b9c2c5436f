//! A virtual machine without an operating system: the firmware (SeaBIOS) and a boot sector on the disk under test.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, bail, ensure};

use super::{
    LinuxGuestConfig,
    config::{Accelerator, Start},
    machine::Machine,
};

/// The beginning of the boot sector's output.
const PREFIX: &str = "boot sector: ";
const SECTOR_BYTES: usize = 512;
/// The number of sectors, as in `boot_sector.S`.
const SECTORS: u16 = 64;

/// A virtual machine that has booted from its disk.
#[derive(Debug)]
pub struct FirmwareGuest {
    machine: Machine,
}

impl FirmwareGuest {
    /// The first bytes of a disk from which [`boot`](Self::boot) boots: a boot sector and the sectors that it reads.
    ///
    /// # Errors
    ///
    /// gcc is missing or fails.
    pub fn disk_content() -> Result<Vec<u8>> {
        let mut content = boot_sector()?;
        for sector in 1..=SECTORS {
            content.extend((0..SECTOR_BYTES / 2).flat_map(|_| sector.to_le_bytes()));
        }
        Ok(content)
    }

    /// The offset at which the boot sector writes the sectors that it has read: behind these sectors.
    pub fn written_offset_bytes() -> u64 {
        (u64::from(SECTORS) + 1) * SECTOR_BYTES as u64
    }

    /// Starts the machine and waits until the boot sector has read and written the disk through the firmware.
    ///
    /// # Errors
    ///
    /// QEMU does not start, the firmware does not boot the disk in this time, or the boot sector fails.
    pub fn boot(config: &LinuxGuestConfig, limit: Duration) -> Result<Self> {
        let mut machine = Machine::start(config, &Start::Firmware, Accelerator::Tcg)?;
        let end = std::time::Instant::now() + limit;
        let said = loop {
            let console = machine.console();
            let line = console.split_once(PREFIX).and_then(|(_, rest)| rest.split_once('\n'));
            if let Some((said, _)) = line {
                break said.to_owned();
            }
            ensure!(std::time::Instant::now() < end, "no boot after {limit:?}\n{}", machine.describe());
            if !machine.agent.pump(Duration::from_millis(20))? {
                bail!("QEMU has ended\n{}", machine.describe());
            }
        };
        ensure!(said.trim() == "all is well", "{PREFIX}{said}\n{}", machine.describe());
        Ok(Self { machine })
    }

    /// The output of the firmware and the boot sector.
    pub fn console(&self) -> String {
        self.machine.console()
    }
}

fn boot_sector() -> Result<Vec<u8>> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/linux_guest/boot_sector.S");
    let directory = tempfile::tempdir().context("cannot make a directory")?;
    let binary = directory.path().join("boot_sector");
    assemble(Path::new(source), &binary)?;
    let bytes = fs::read(&binary).context("cannot read the boot sector")?;
    ensure!(bytes.len() == SECTOR_BYTES, "the boot sector has {} bytes", bytes.len());
    Ok(bytes)
}

fn assemble(source: &Path, binary: &Path) -> Result<()> {
    let mut gcc = Command::new("gcc");
    gcc.args(["-m16", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-Ttext=0x7c00"]);
    let output =
        gcc.arg("-Wl,--oformat=binary").arg("-o").arg(binary).arg(source).output().context("cannot start gcc")?;
    ensure!(output.status.success(), "assembling the boot sector: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
