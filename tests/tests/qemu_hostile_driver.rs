//! A driver in QEMU sets up its queue wrongly. The broker stops that queue, and after a reset by the driver the disk
//! works on the same connection.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    bare_qemu::{self, BAR_ADDRESS, BareQemu, Queue, RAM_BYTES},
    broker_process,
    disks::DiskKind,
    front_end::{
        blk::header,
        descriptor::{Descriptor, linked_table},
        rig::Rig,
    },
    harness::{self, test},
};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

const DISK_BYTES: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
/// A correct queue in RAM.
const RIGHT: Queue = Queue { size: 64, desc: 0x10_0000, avail: 0x10_1000, used: 0x10_2000 };
const HEADER: u64 = 0x10_3000;
const STATUS: u64 = 0x10_3800;
const DATA: u64 = 0x10_4000;

fn main() -> ExitCode {
    let needs = DiskKind::Ext4PageCache.needs().into_iter().chain(broker_process::needs()).chain(bare_qemu::needs());
    harness::run(vec![test("a_driver_in_qemu_breaks_its_queue_and_its_reset_revives_the_disk", needs, hostile_driver)])
}

fn hostile_driver() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&[])?;
    let mut qemu = BareQemu::start(&rig.socket())?;
    read_first_block(&mut qemu).context("a driver that does nothing wrong")?;
    // An address between RAM and the first device, and the registers of a device.
    let (outside, bar) = (RAM_BYTES + (1 << 20), BAR_ADDRESS + 0x1000);
    let wrong = [
        ("size 15", Queue { size: 15, ..RIGHT }),
        ("size 33", Queue { size: 33, ..RIGHT }),
        // More descriptors than the front-end's in-flight region has.
        ("size 1024", Queue { size: 1024, ..RIGHT }),
        ("misaligned descriptors", Queue { desc: RIGHT.desc + 8, ..RIGHT }),
        ("misaligned available ring", Queue { avail: RIGHT.avail + 1, ..RIGHT }),
        ("misaligned used ring", Queue { used: RIGHT.used + 2, ..RIGHT }),
        ("descriptors outside RAM", Queue { desc: outside, ..RIGHT }),
        ("available ring outside RAM", Queue { avail: outside, ..RIGHT }),
        ("used ring outside RAM", Queue { used: outside, ..RIGHT }),
        ("descriptors in a BAR", Queue { desc: bar, ..RIGHT }),
        ("available ring in a BAR", Queue { avail: bar, ..RIGHT }),
        ("used ring in a BAR", Queue { used: bar, ..RIGHT }),
    ];
    for (what, queue) in wrong {
        let tried = qemu.set_up(queue).and_then(|()| read_first_block(&mut qemu));
        broker.explain(tried.with_context(|| format!("{what}; QEMU said {}", qemu.complaints())))?;
    }
    for said in [
        "guest error: a ring of 15 descriptors: the driver must give a power of two",
        "the driver must align it to 16 bytes",
        "the driver must put it into one region of guest memory",
    ] {
        broker.explain(broker.wait_for_log(said))?;
    }
    let log = broker.log();
    ensure!(log.matches("front-end connected").count() == 1, "QEMU has connected again:\n{log}");
    for end in ["connection to the front-end closed", "front-end disconnected"] {
        ensure!(!log.contains(end), "the connection has ended:\n{log}");
    }
    Ok(())
}

/// Resets the device, sets it up correctly, and reads a block of zeroes.
fn read_first_block(qemu: &mut BareQemu) -> Result<()> {
    qemu.reset()?;
    for ring in [RIGHT.desc, RIGHT.avail, RIGHT.used] {
        qemu.write_ram(ring, &[0; 0x800])?;
    }
    qemu.write_ram(DATA, &[0xff; 512])?;
    qemu.write_ram(STATUS, &[0xff])?;
    qemu.write_ram(HEADER, &header(VIRTIO_BLK_T_IN, 0))?;
    let chain = [Descriptor::readable(HEADER, 16), Descriptor::writable(DATA, 512), Descriptor::writable(STATUS, 1)];
    qemu.write_ram(RIGHT.desc, &linked_table(&chain)?)?;
    qemu.set_up(RIGHT)?;
    // Flags 0, one entry, which is descriptor 0.
    qemu.write_ram(RIGHT.avail, &[0, 0, 1, 0, 0, 0])?;
    qemu.notify()?;
    let end = Instant::now() + PATIENCE;
    while qemu.read_ram(RIGHT.used + 2, 2)? != [1, 0] {
        ensure!(Instant::now() < end, "the request is not answered in {PATIENCE:?}");
    }
    ensure!(qemu.read_ram(STATUS, 1)? == [0] && qemu.read_ram(DATA, 512)? == [0; 512], "the block is not read");
    Ok(())
}
