//! A hostile driver and an honest one, each with its own queue of the same device.

use std::{
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use ringpass_tests::{
    disks::DiskKind,
    front_end::{
        blk::{BlkDriver, SECTOR_BYTES},
        event::Event,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
    },
};
use vhost::vhost_user::message::FrontendReq;
use vm_memory::{Bytes, GuestAddress};

pub(crate) const DISK_BYTES: u64 = 4 << 20;
pub(crate) const SECTORS: u64 = DISK_BYTES / SECTOR_BYTES;
pub(crate) const REGION_BYTES: u64 = 2 << 20;

/// Guest-physical address at which there is no RAM.
pub(crate) const NOWHERE_GPA: u64 = 1 << 40;

const CANARY: u8 = 0xc5;

/// The length of the hostile driver's data, and of the canary behind it.
pub(crate) const DATA_BYTES: u32 = 64 << 10;

/// A hostile driver on queue 0, an honest one on queue 1.
pub(crate) struct Bench {
    ram: TestRam,
    front_end: FrontEnd,
    pub(crate) hostile: BlkDriver,
    honest: BlkDriver,
    /// The device signals this when queue 0 stops.
    pub(crate) error: Event,
    /// RAM beside the data of the hostile driver. No chain allows the device to write it.
    pub(crate) canary_gpa: u64,
    /// RAM for tables of descriptors.
    pub(crate) table_gpa: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Answered(u8),
    Stopped,
}

pub(crate) fn with_bench(body: fn(&mut Bench) -> Result<()>) -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "2"])?;
    let result = Bench::new(&rig).and_then(|mut bench| {
        body(&mut bench)?;
        bench.check_canaries()?;
        ensure!(rig.disk_file()?.metadata()?.len() == DISK_BYTES, "the disk has another size");
        Ok(())
    });
    broker.explain(result)
}

impl Bench {
    pub(crate) fn new(rig: &Rig) -> Result<Self> {
        let mut ram = TestRam::new(2, REGION_BYTES)?;
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        let honest = ram.driver(&front_end, 1, 4096)?;
        let hostile = ram.driver(&front_end, 0, DATA_BYTES)?;
        let canary_gpa = ram.arenas[0].take(DATA_BYTES.into(), 4096)?;
        let table_gpa = ram.arenas[0].take(DATA_BYTES.into(), 4096)?;
        ram.ram.memory().write_slice(&[CANARY; DATA_BYTES as usize], GuestAddress(canary_gpa))?;
        let error = Event::new()?;
        front_end.connection().set_vring_fd(FrontendReq::SET_VRING_ERR, 0, Some(error.as_fd()))?;
        Ok(Self { ram, front_end, hostile, honest, error, canary_gpa, table_gpa })
    }

    pub(crate) fn check_canaries(&self) -> Result<()> {
        let mut found = vec![0; DATA_BYTES as usize];
        self.ram.ram.memory().read_slice(&mut found, GuestAddress(self.canary_gpa))?;
        ensure!(found.iter().all(|&byte| byte == CANARY), "the device wrote where no chain allows it");
        Ok(())
    }

    /// Checks that the device serves the other queue.
    pub(crate) fn check_honest(&mut self) -> Result<()> {
        let sector = SECTORS - 8;
        self.honest.write(sector, &[0x42; 4096])?;
        ensure!(self.honest.read(sector, 4096)? == [0x42; 4096], "the honest queue reads something else");
        Ok(())
    }

    /// Makes the chain at `head` of the descriptor table available, and waits until the device uses it or stops the
    /// queue.
    pub(crate) fn send_raw(&mut self, head: u16) -> Result<Outcome> {
        let vring = self.hostile.vring();
        vring.add_head(head)?;
        vring.publish_quietly()?;
        vring.kick()?;
        self.outcome()
    }

    pub(crate) fn outcome(&mut self) -> Result<Outcome> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if self.error.wait(Duration::ZERO)? {
                return Ok(Outcome::Stopped);
            }
            if self.hostile.vring().take_used()?.is_some() {
                return Ok(Outcome::Answered(self.hostile.status()?));
            }
            ensure!(Instant::now() < end, "the device neither answers nor stops the queue");
            thread::yield_now();
        }
    }

    /// Stops queue 0 in any state, and starts it empty.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.front_end.stop_vring(0)?;
        self.error.take()?;
        let vring = self.hostile.vring();
        // The driver forgets the chains that the device has not answered.
        vring.reset()?;
        let (layout, eventfds) = (vring.layout(), vring.eventfds().clone());
        self.front_end.start_vring(0, &layout, &eventfds, 0)
    }

    pub(crate) fn put(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.ram.ram.memory().write_slice(bytes, GuestAddress(gpa))?)
    }
}
