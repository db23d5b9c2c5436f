//! A guest on a disk whose writes a test can make hang.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use super::RingDriver;
use crate::{
    broker_process::BrokerProcess,
    front_end::{
        rig::TestRam,
        session::{FrontEnd, Options},
    },
    stuck_disk::{StuckDisk, StuckKind},
};

const ARGUMENTS: [&str; 6] = ["--direct-io", "on", "--mode", "direct", "--num-queues", "3"];

/// A guest on a disk whose writes a test can make hang.
#[derive(Debug)]
pub struct SlowGuest {
    /// Serves the disk, with rings.
    pub broker: BrokerProcess,
    directory: TempDir,
    /// The guest's RAM.
    pub ram: TestRam,
    /// The last field: its drop waits until no process has the disk open.
    pub disk: StuckDisk,
}

impl SlowGuest {
    /// The `user_data` of a write that hangs.
    pub const HANGING: u64 = 77;
    /// The place of that write on the disk.
    pub const HANGING_OFFSET_BYTES: u64 = 8192;

    /// A disk of 4 MiB and a broker on it.
    ///
    /// # Errors
    ///
    /// A program that the disk or the broker needs fails.
    pub fn new(kind: StuckKind) -> Result<Self> {
        let disk = StuckDisk::new(kind, 4 << 20)?;
        let directory = TempDir::new()?;
        let broker = BrokerProcess::start(&socket_in(&directory), disk.path(), &ARGUMENTS)?;
        Ok(Self { disk, directory, broker, ram: TestRam::new(1, 16 << 20)? })
    }

    /// A front-end.
    ///
    /// # Errors
    ///
    /// The back-end refuses a message.
    pub fn connect(&self) -> Result<FrontEnd> {
        FrontEnd::connect(&socket_in(&self.directory), &self.ram.ram, Options::default())
    }

    /// Starts another broker while the I/O of the first broker has not ended.
    ///
    /// # Errors
    ///
    /// The broker does not start.
    pub fn start_beside(&self) -> Result<BrokerProcess> {
        BrokerProcess::start(&socket_in(&self.directory), self.disk.path(), &ARGUMENTS)
    }

    /// Submits a write of 4096 bytes from the driver's first buffer, and waits until it hangs.
    ///
    /// # Errors
    ///
    /// The write does not hang.
    pub fn hang(&self, driver: &mut RingDriver) -> Result<()> {
        self.hang_from(driver, driver.buffers().at(0))
    }

    /// The same with data at any guest-physical address.
    ///
    /// # Errors
    ///
    /// The write does not hang.
    pub fn hang_from(&self, driver: &mut RingDriver, gpa: u64) -> Result<()> {
        self.disk.freeze()?;
        driver.submit(driver.sqe_at(true, gpa, 4096, Self::HANGING_OFFSET_BYTES, Self::HANGING)?)?;
        self.disk.wait_for_hanging_write(|| self.broker.has_hanging_thread())?;
        driver.reap();
        ensure!(driver.outstanding().len() == 1, "the write did not hang");
        Ok(())
    }
}

fn socket_in(directory: &TempDir) -> PathBuf {
    directory.path().join("vhost.sock")
}
