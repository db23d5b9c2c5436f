//! A guest of the broker in the child process: its RAM, its queue, and what its RAM held before.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ringpass_broker::ring::RingConfig;
use ringpass_guest::RamArea;
use ringpass_guest_abi::Sqe;
use ringpass_tests::{
    canaries::pattern,
    process_guest::{GuestQueue, PageSize, Place, ProcessGuest, RamFile},
};
use ringpass_workload::{
    ProcessEnv,
    hostile::{Expect, Extent, HostileReport, Name, Step, run_hostile},
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
pub(crate) const PAGE_BYTES: u32 = 4096;

pub(crate) const BUFFER_BYTES: u32 = 8192;
const RING: RingConfig = RingConfig { sq_entries: 64, cq_entries: 128 };

/// RAM like that of a PC: a filled hole, slots without RAM, RAM across the border of two slots with a hole longer than the
/// scratch file behind it, and a last slot with RAM in the middle. Slots have 4 MiB.
pub(crate) const RAM: [Extent; 5] = [
    extent(0, 640 * KIB),
    extent(MIB, 7 * MIB),
    extent(2 * GIB - 2 * MIB, 2 * MIB + 256 * KIB),
    extent(2 * GIB + 3 * MIB, MIB),
    extent(5 * GIB + 513 * MIB, MIB),
];
pub(crate) const FILLED_HOLES: [Extent; 2] =
    [extent(640 * KIB, 384 * KIB), extent(2 * GIB + 256 * KIB, 3 * MIB - 256 * KIB)];
pub(crate) const EMPTY_HOLES: [Extent; 6] = [
    extent(8 * MIB, GIB - 8 * MIB),
    extent(GIB, GIB - 2 * MIB),
    extent(2 * GIB + 4 * MIB, 4 * KIB),
    extent(3 * GIB, GIB),
    extent(5 * GIB, 513 * MIB),
    extent(5 * GIB + 514 * MIB, GIB),
];

const fn extent(gpa: u64, len_bytes: u64) -> Extent {
    Extent { gpa, len_bytes }
}

/// RAM in which no page is all zeros.
pub(crate) fn filled_ram(seed: u64) -> Result<RamFile> {
    let ram = RamFile::new(&RAM, PageSize::Small)?;
    for (index, region) in (0u64..).zip(&RAM) {
        ram.write(region.gpa, &pattern(seed * 100 + index, usize::try_from(region.len_bytes)?))?;
    }
    Ok(ram)
}

pub(crate) enum Direction {
    Read,
    Write,
}

/// A guest with one queue and one buffer, and what its RAM held before.
pub(crate) struct Guest {
    pub(crate) guest: ProcessGuest,
    pub(crate) queue: GuestQueue,
    env: ProcessEnv,
    pub(crate) buffer: Extent,
    before: Vec<(Extent, Vec<u8>)>,
}

impl Guest {
    pub(crate) fn new(mut guest: ProcessGuest, place: Place) -> Result<Self> {
        let queue = guest.attach(RING, place)?;
        let buffer: RamArea = guest.allocator().allocate(u64::from(BUFFER_BYTES))?;
        let extent = Extent { gpa: buffer.gpa(), len_bytes: buffer.len_bytes() };
        let env = queue.env(buffer)?;
        let mut made = Self { guest, queue, env, buffer: extent, before: Vec::new() };
        made.before = made.now()?;
        Ok(made)
    }

    fn now(&self) -> Result<Vec<(Extent, Vec<u8>)>> {
        RAM.iter().map(|region| Ok((*region, self.guest.ram().read(region.gpa, region.len_bytes)?))).collect()
    }

    /// The pages that have changed, except those of the buffer and the ring.
    pub(crate) fn damage(&self, what: &str) -> Result<Vec<String>> {
        let may_change = [&[self.buffer], self.queue.areas()].concat();
        let now = self.now()?;
        let mut damage = Vec::new();
        for ((region, before), (_, now)) in self.before.iter().zip(&now) {
            let pages = before.chunks(PAGE_BYTES as usize).zip(now.chunks(PAGE_BYTES as usize));
            for (gpa, (before, now)) in (region.gpa..).step_by(PAGE_BYTES as usize).zip(pages) {
                let is_free = may_change.iter().any(|area| (area.gpa..area.gpa + area.len_bytes).contains(&gpa));
                if before != now && !is_free {
                    damage.push(format!("damage: {what}: page {gpa:#x}"));
                }
            }
        }
        Ok(damage)
    }

    pub(crate) fn run(&mut self, steps: impl Iterator<Item = Step>, timeout: Duration) -> HostileReport {
        run_hostile(self.queue.ring().ring_mut(), &mut self.env, steps, timeout.as_nanos() as u64)
    }

    /// Moves one page between the disk and guest memory, which must succeed.
    pub(crate) fn request(&mut self, direction: Direction, gpa: u64, offset_bytes: u64) -> Result<()> {
        let address = self.guest.addressing().resolve(gpa, PAGE_BYTES).context("the address")?;
        let (what, sqe) = match direction {
            Direction::Read => ("read", Sqe::read_fixed(address, PAGE_BYTES, offset_bytes, 0)),
            Direction::Write => ("write", Sqe::write_fixed(address, PAGE_BYTES, offset_bytes, 0)),
        };
        let name = Name { what, opcode: sqe.opcode, value: gpa };
        let step = Step { name, sqe, expect: Expect::Exactly(PAGE_BYTES) };
        let report = self.run([step].into_iter(), Duration::from_secs(10));
        ensure!(report.is_clean(), "a {what} at guest-physical {gpa:#x}: {report:?}");
        Ok(())
    }
}
