//! What the hostile guest submits, and the guest itself.

use std::fmt;

use anyhow::{Context, Result};
use ringpass_tests::{
    broker_process::BrokerProcess,
    disks::DiskKind,
    front_end::{
        attach::{
            QueueZero,
            bench::start_queue_zero,
            flooder::{BUFFER_BYTES, Flooder, FlooderRing},
        },
        ram::RamRegion,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
    },
};
use rustix::fs::{FallocateFlags, fallocate};

const DISK_BYTES: u64 = 64 << 20;
/// Room for rings and requests.
const RAM_BYTES: u64 = 16 << 20;
/// Where the region of the buffer begins.
const BUFFER_GPA: u64 = 64 << 20;
/// The hostile guest's queue.
pub(crate) const QUEUE: u16 = 1;

/// One kind of request, on one kind of disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attack {
    name: &'static str,
    pub(crate) disk: DiskKind,
    is_write: bool,
    len_bytes: u32,
    /// The blocks are given back before, as a guest does by DISCARD: the kernel fills the reader's memory with zeros.
    has_holes: bool,
}

impl Attack {
    pub(crate) const READS_OF_HOLES: Self = Self {
        name: "long_reads_of_holes",
        disk: DiskKind::Ext4Direct,
        is_write: false,
        len_bytes: BUFFER_BYTES,
        has_holes: true,
    };
    pub(crate) const SMALL_READS: Self = Self {
        name: "small_reads_without_end",
        disk: DiskKind::Ext4Direct,
        is_write: false,
        len_bytes: 512,
        has_holes: false,
    };
    /// No attack: what an honest guest does under full load.
    pub(crate) const ORDINARY_READS: Self =
        Self { name: "ordinary_reads", disk: DiskKind::Ext4Direct, is_write: false, len_bytes: 4096, has_holes: false };
    /// The file has no blocks yet, so each write has to wait for them on another thread.
    pub(crate) const WRITES_INTO_HOLES: Self = Self {
        name: "long_writes_into_holes",
        disk: DiskKind::Ext4Direct,
        is_write: true,
        len_bytes: BUFFER_BYTES,
        has_holes: true,
    };
    const LONG_WRITES: Self = Self {
        name: "long_writes_to_a_block_device",
        disk: DiskKind::Zram,
        is_write: true,
        len_bytes: BUFFER_BYTES,
        has_holes: false,
    };

    pub(crate) const ALL: [Self; 4] =
        [Self::READS_OF_HOLES, Self::SMALL_READS, Self::WRITES_INTO_HOLES, Self::LONG_WRITES];
}

impl fmt::Display for Attack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A hostile guest with the largest ring, and its server.
pub(crate) struct Hostile {
    pub(crate) rig: Rig,
    pub(crate) broker: BrokerProcess,
    pub(crate) ram: TestRam,
    /// The memory of all requests' buffer, which is a slot.
    pub(crate) buffer: RamRegion,
    pub(crate) front_end: FrontEnd,
    pub(crate) first: QueueZero,
    pub(crate) flooder: Flooder,
}

impl Hostile {
    pub(crate) fn start(attack: Attack, submission: &str) -> Result<Self> {
        Self::start_with(attack, &["--submission", submission])
    }

    /// The same with these arguments for its server.
    pub(crate) fn start_with(attack: Attack, arguments: &[&str]) -> Result<Self> {
        let rig = Rig::new(attack.disk, DISK_BYTES)?;
        if attack.has_holes {
            let disk = std::fs::File::options().write(true).open(rig.disk().path())?;
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&disk, mode, 0, DISK_BYTES).context("cannot make holes in the disk")?;
        }
        let broker = rig.broker(&[&["--mode", "direct", "--num-queues", "4"], arguments].concat())?;
        let mut ram = TestRam::new(1, RAM_BYTES)?;
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        let buffer = RamRegion::new(BUFFER_GPA, BUFFER_BYTES.into())?;
        front_end.connection().add_mem_reg(&buffer.message(), buffer.file())?;
        let mut first = broker.explain(start_queue_zero(&front_end, &mut ram))?;
        let (offered, _) = first.probe_answer()?;
        let largest =
            FlooderRing { sq_entries: offered.sq_entries_max.get(), cq_entries: offered.cq_entries_max.get() };
        let mut flooder = broker.explain(Flooder::attach(&front_end, &mut ram, BUFFER_GPA, QUEUE, largest))?;
        broker.explain(flooder.fill(attack.is_write, attack.len_bytes, DISK_BYTES))?;
        Ok(Self { rig, broker, ram, buffer, front_end, first, flooder })
    }
}
