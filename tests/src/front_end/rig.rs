//! A broker with a disk, and the vrings of a front-end on it: most tests begin with them.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{
    blk::BlkDriver,
    event::Eventfds,
    load::{BLOCK_BYTES, Load, LoadOptions},
    ram::{Arena, Ram, RamRegion},
    session::FrontEnd,
    vring::{DriverVring, VringLayout},
};
use crate::{
    broker_process::{self, BrokerProcess},
    disks::{DiskKind, TestDisk},
};

/// A disk, a place for the socket, and brokers for them.
#[derive(Debug)]
pub struct Rig {
    directory: TempDir,
    disk: TestDisk,
}

impl Rig {
    /// A disk of zeroes.
    ///
    /// # Errors
    ///
    /// The machine cannot have such a disk.
    pub fn new(kind: DiskKind, size_bytes: u64) -> Result<Self> {
        Ok(Self { directory: TempDir::with_prefix("ringpass-vhost-")?, disk: TestDisk::new(kind, size_bytes)? })
    }

    /// The disk.
    pub fn disk(&self) -> &TestDisk {
        &self.disk
    }

    /// The disk's file or device, opened beside the broker for reading.
    ///
    /// # Errors
    ///
    /// The disk cannot be opened.
    pub fn disk_file(&self) -> Result<File> {
        File::open(self.disk.path()).context("cannot open the disk beside the broker")
    }

    /// Where the broker listens.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("vhost.sock")
    }

    /// A directory for further files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts a broker, with direct I/O as the disk's kind says and with these further arguments.
    ///
    /// # Errors
    ///
    /// The broker does not listen.
    pub fn broker(&self, arguments: &[&str]) -> Result<BrokerProcess> {
        let direct_io = if self.disk.kind() == DiskKind::Ext4PageCache { "off" } else { "on" };
        let arguments = [&["--direct-io", direct_io], arguments].concat();
        BrokerProcess::start(&self.socket(), self.disk.path(), &arguments)
    }

    /// A `ringpass dev` command that sees this rig's broker. The name of the device is `vhost`.
    ///
    /// # Errors
    ///
    /// The program is missing.
    pub fn dev(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(broker_process::program()?);
        command.arg("dev").args(arguments).env("RUNTIME_DIRECTORY", self.directory());
        Ok(command)
    }
}

/// Guest RAM of a test, with what is left of it.
#[derive(Debug)]
pub struct TestRam {
    /// The RAM.
    pub ram: Ram,
    /// What is left of each region.
    pub arenas: Vec<Arena>,
}

impl TestRam {
    /// This many regions of `region_bytes`, with holes between them, the first at guest address 0.
    ///
    /// # Errors
    ///
    /// The machine has no memory left.
    pub fn new(regions: u64, region_bytes: u64) -> Result<Self> {
        let distance = region_bytes + (1 << 20);
        let regions = (0..regions).map(|index| RamRegion::new(index * distance, region_bytes));
        let regions = regions.collect::<Result<Vec<_>>>()?;
        let arenas = regions.iter().map(RamRegion::arena).collect();
        Ok(Self { ram: Ram::new(regions)?, arenas })
    }

    /// A vring for `front_end`, not started.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn vring(&mut self, front_end: &FrontEnd, size: u16) -> Result<DriverVring> {
        let layout = VringLayout::take(&mut self.arenas[0], size)?;
        DriverVring::new(&self.ram, layout, front_end.has_event_idx(), Eventfds::new()?)
    }

    /// A vring that is started, with a driver for one request at a time of up to `data_bytes`.
    ///
    /// # Errors
    ///
    /// The back-end refuses a message.
    pub fn driver(&mut self, front_end: &FrontEnd, index: u16, data_bytes: u32) -> Result<BlkDriver> {
        let vring = self.vring(front_end, 128)?;
        front_end.start_vring(index, &vring.layout(), vring.eventfds(), 0)?;
        BlkDriver::new(vring, &mut self.arenas[0], data_bytes)
    }

    /// A vring that is started, with a load on it.
    ///
    /// # Errors
    ///
    /// The back-end refuses a message.
    pub fn load(&mut self, front_end: &FrontEnd, index: u16, size: u16, options: LoadOptions) -> Result<Load> {
        let vring = self.vring(front_end, size)?;
        front_end.start_vring(index, &vring.layout(), vring.eventfds(), 0)?;
        Load::new(vring, &mut self.arenas, options)
    }
}

/// How many blocks of a load a disk has.
pub fn disk_blocks(size_bytes: u64) -> u64 {
    size_bytes / BLOCK_BYTES
}
