//! A guest with the repository's driver, on a disk whose queues become rings of `ringpass serve`.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{BlockDriver, LinuxGuest, LinuxGuestConfig, VhostUserDisk};
use crate::{
    broker_process::{self, BrokerProcess},
    disks::{DiskKind, TestDisk},
    needs::Need,
};

const DISK_BYTES: u64 = 64 << 20;
/// A queue for each of two CPUs, and queue 0, which has no ring.
const QUEUES: u16 = 3;

/// A script that waits until every queue that can have a ring has one.
pub const AWAIT_RINGS: &str = "tries=0
    until [ \"$(cat /sys/block/vda/ringpass/queue[12]/mode | sort -u)\" = ring ]; do
        usleep 20000
        tries=$((tries + 1))
        if [ $tries = 1500 ]; then
            grep . /sys/block/vda/ringpass/*/*
            dmesg | tail
            exit 1
        fi
    done";

/// What such a guest needs of the machine.
pub fn needs() -> Vec<Need> {
    [super::needs(), broker_process::needs(), DiskKind::Ext4Direct.needs()].into_iter().flatten().collect()
}

/// A disk and the broker that serves it.
#[derive(Debug)]
pub struct ServedDisk {
    /// The broker, which the test may kill.
    pub broker: BrokerProcess,
    disk: TestDisk,
    directory: tempfile::TempDir,
}

impl ServedDisk {
    /// Serves a new disk.
    ///
    /// # Errors
    ///
    /// The broker does not start.
    pub fn new() -> Result<Self> {
        let disk = TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?;
        let directory = tempfile::tempdir().context("cannot make a directory for a socket")?;
        let broker = start(&directory, &disk)?;
        Ok(Self { broker, disk, directory })
    }

    /// Starts the broker again that the test has killed.
    ///
    /// # Errors
    ///
    /// The broker does not start.
    pub fn start_again(&mut self) -> Result<()> {
        self.broker = start(&self.directory, &self.disk)?;
        Ok(())
    }

    /// The guest's device for this disk.
    pub fn device(&self) -> VhostUserDisk {
        let properties = vec!["config-wce=on".to_owned()];
        VhostUserDisk {
            queues: QUEUES,
            reconnect: true,
            properties,
            ..VhostUserDisk::new("disk", self.broker.socket())
        }
    }

    /// Boots a guest with the driver, and waits until its queues have rings. `config` has the rest.
    ///
    /// # Errors
    ///
    /// The driver cannot be built, the guest does not boot, or it gets no rings.
    pub fn boot(&self, config: LinuxGuestConfig) -> Result<LinuxGuest> {
        let driver = BlockDriver::of(config.kernel)?;
        let config = LinuxGuestConfig { disks: vec![self.device()], block_driver: Some(driver), ..config };
        let mut guest = self.broker.explain(LinuxGuest::boot(&config))?;
        self.broker.explain(guest.run(AWAIT_RINGS))?;
        Ok(guest)
    }

    /// Changes the broker's mode as an operator does.
    ///
    /// # Errors
    ///
    /// The broker refuses.
    pub fn set_mode(&self, mode: &str) -> Result<()> {
        let mut command = Command::new(broker_process::program()?);
        command.args(["dev", "set", "broker", "mode", mode]).env("RUNTIME_DIRECTORY", self.directory.path());
        let output = command.output().context("cannot start the program")?;
        ensure!(output.status.success(), "mode {mode}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Ends the broker, and checks that it ends with success.
    ///
    /// # Errors
    ///
    /// It does not.
    pub fn end(mut self) -> Result<()> {
        let status = self.broker.terminate()?;
        ensure!(status.success(), "the broker: {status}\n{}", self.broker.log());
        Ok(())
    }
}

fn start(directory: &tempfile::TempDir, disk: &TestDisk) -> Result<BrokerProcess> {
    BrokerProcess::start(&directory.path().join("broker.sock"), disk.path(), &["--num-queues", &QUEUES.to_string()])
}

/// Sums a statistic of the driver over all queues.
///
/// # Errors
///
/// The guest has no such statistic.
pub fn statistic(guest: &mut LinuxGuest, name: &str) -> Result<u64> {
    let lines = guest.run(&format!("cat /sys/block/vda/ringpass/queue*/{name}"))?;
    lines.lines().map(|line| line.parse::<u64>().context("a number")).sum()
}
