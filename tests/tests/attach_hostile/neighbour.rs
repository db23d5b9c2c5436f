//! What a hostile guest must not change: an honest queue on the same device, and memory that the front-end has not
//! offered.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    canaries::pattern,
    front_end::{
        attach::RingDriver,
        ram::{Ram, RamRegion},
        rig::TestRam,
    },
    seed::Seed,
};
use rustix::fs::{MemfdFlags, memfd_create};

const MIB: u64 = 1 << 20;
const BLOCK_BYTES: usize = 4096;
/// The honest queue's part of the disk.
const AREA_OFFSET_BYTES: u64 = 15 * MIB;
const BLOCKS: u64 = 256;

/// The honest queue's region. Its address is so high that random numbers of the hostile guest do not name it.
const HONEST_GPA: u64 = 0x5_4000_0000;
const HONEST_BYTES: u64 = 3 * MIB;
/// The end of the honest queue's region, which the queue does not use.
const UNUSED_BYTES: u64 = MIB;
/// The hostile guest's region.
pub(crate) const HOSTILE_GPA: u64 = 1 << 30;
/// The length of the hostile guest's region.
pub(crate) const HOSTILE_BYTES: u64 = 4 * MIB;
const GAP_BYTES: u64 = MIB;

/// Guest RAM that is parts of one file, and the rest of that file.
pub(crate) struct Surroundings {
    file: Arc<File>,
    /// The parts of the file that must not change: offset and content.
    canaries: Vec<(u64, Vec<u8>)>,
}

impl Surroundings {
    /// Makes the RAM: the honest queue's region, then the hostile guest's.
    pub(crate) fn new() -> Result<(Self, TestRam)> {
        let file = File::from(memfd_create("ringpass-test-ram", MemfdFlags::CLOEXEC)?);
        let honest_offset = GAP_BYTES;
        let hostile_offset = honest_offset + HONEST_BYTES + GAP_BYTES;
        file.set_len(hostile_offset + HOSTILE_BYTES + GAP_BYTES)?;
        let file = Arc::new(file);
        let gaps = [
            (0, GAP_BYTES),
            (honest_offset + HONEST_BYTES - UNUSED_BYTES, UNUSED_BYTES + GAP_BYTES),
            (hostile_offset + HOSTILE_BYTES, GAP_BYTES),
        ];
        let canaries = (1..).zip(gaps).map(|(seed, (offset_bytes, len_bytes))| {
            let content = pattern(seed, usize::try_from(len_bytes)?);
            file.write_all_at(&content, offset_bytes)?;
            Ok((offset_bytes, content))
        });
        let canaries = canaries.collect::<Result<Vec<_>>>()?;
        let regions = [
            RamRegion::of_file(file.clone(), honest_offset, HONEST_GPA, HONEST_BYTES)?,
            RamRegion::of_file(file.clone(), hostile_offset, HOSTILE_GPA, HOSTILE_BYTES)?,
        ];
        let arenas = regions.iter().map(RamRegion::arena).collect();
        Ok((Self { file, canaries }, TestRam { ram: Ram::new(regions)?, arenas }))
    }

    /// Checks that the canaries have not changed.
    pub(crate) fn check(&self) -> Result<()> {
        for (offset_bytes, content) in &self.canaries {
            let mut found = vec![0; content.len()];
            self.file.read_exact_at(&mut found, *offset_bytes)?;
            let wrong = found.iter().zip(content).position(|(found, expected)| found != expected);
            ensure!(
                wrong.is_none(),
                "byte {:?} of the memory file has changed",
                wrong.map(|at| *offset_bytes + at as u64)
            );
        }
        Ok(())
    }
}

/// The honest queue, and the version of each of its blocks.
pub(crate) struct Honest {
    /// Its driver.
    pub(crate) driver: RingDriver,
    versions: Vec<u64>,
    rng: fastrand::Rng,
    steps: u64,
    worst: Duration,
}

impl Honest {
    /// Makes the queue for a disk of zeroes.
    pub(crate) fn new(driver: RingDriver, seed: Seed) -> Self {
        Self {
            driver,
            versions: vec![0; BLOCKS as usize],
            rng: seed.derive("honest").rng(),
            steps: 0,
            worst: Duration::ZERO,
        }
    }

    /// Writes a block, and reads another.
    pub(crate) fn step(&mut self) -> Result<()> {
        let begin = Instant::now();
        self.steps += 1;
        let block = self.rng.u64(..BLOCKS);
        let data = content(block, self.steps);
        self.driver.write(AREA_OFFSET_BYTES + block * BLOCK_BYTES as u64, &data).context("the honest queue")?;
        self.versions[block as usize] = self.steps;
        let block = self.rng.u64(..BLOCKS);
        self.check(block)?;
        self.worst = self.worst.max(begin.elapsed());
        Ok(())
    }

    /// Reads and checks all blocks.
    pub(crate) fn check_all(&mut self) -> Result<()> {
        (0..BLOCKS).try_for_each(|block| self.check(block))
    }

    fn check(&mut self, block: u64) -> Result<()> {
        let offset_bytes = AREA_OFFSET_BYTES + block * BLOCK_BYTES as u64;
        let found = self.driver.read(offset_bytes, BLOCK_BYTES as u32).context("the honest queue")?;
        let version = self.versions[block as usize];
        ensure!(found == content(block, version), "block {block} of the honest queue is not version {version}");
        Ok(())
    }

    /// The number of steps and the longest one, as text.
    pub(crate) fn summary(&self) -> String {
        format!("{} verified steps of the honest queue, the longest took {:?}", self.steps, self.worst)
    }
}

fn content(block: u64, version: u64) -> Vec<u8> {
    if version == 0 { vec![0; BLOCK_BYTES] } else { pattern(version << 8 | block, BLOCK_BYTES) }
}
