//! The content that a disk must have: each block has a version, and each version has its own content.

use std::{fs::File, hash::Hash, os::unix::fs::FileExt};

use anyhow::{Context, Result, bail};

use crate::seed::Seed;

/// Length of a block of the model. Requests are in whole blocks.
pub const BLOCK_BYTES: u64 = 4096;

/// A version: 0 is a block of zeroes.
type Version = u32;

/// The content of an area of the disk after all completed requests.
#[derive(Debug, Clone)]
pub struct Model {
    first_block: u64,
    seed: Seed,
    versions: Vec<Version>,
    /// Blocks of requests under way, which no other request may touch.
    busy: Vec<bool>,
    next_version: Version,
}

impl Model {
    /// An area of zeroes.
    pub fn zeroes(first_block: u64, blocks: u64, seed: Seed) -> Self {
        let blocks = usize::try_from(blocks).expect("test disks are small");
        Self { first_block, seed, versions: vec![0; blocks], busy: vec![false; blocks], next_version: 1 }
    }

    /// How many blocks the area has.
    pub fn blocks(&self) -> usize {
        self.versions.len()
    }

    /// Where a block of the area is on the disk.
    pub fn offset_bytes(&self, block: usize) -> u64 {
        (self.first_block + block as u64) * BLOCK_BYTES
    }

    /// Takes some adjacent free blocks, if the first try finds any.
    pub fn try_take(&mut self, rng: &mut fastrand::Rng, most_blocks: usize) -> Option<(usize, usize)> {
        let count = rng.usize(1..=most_blocks.min(self.blocks()));
        let first = rng.usize(0..=self.blocks() - count);
        if self.busy[first..first + count].contains(&true) {
            return None;
        }
        self.busy[first..first + count].fill(true);
        Some((first, count))
    }

    /// A version that no block ever had.
    pub fn new_version(&mut self) -> Version {
        self.next_version += 1;
        self.next_version - 1
    }

    /// The request for these blocks has ended. With a version, the blocks have the content of that version now.
    pub fn give_back(&mut self, first: usize, count: usize, written: Option<Version>) {
        self.busy[first..first + count].fill(false);
        if let Some(version) = written {
            self.versions[first..first + count].fill(version);
        }
    }

    /// The content of blocks at a version.
    pub fn content(&self, first: usize, version: Version, content: &mut [u8]) {
        for (block, bytes) in (first..).zip(content.chunks_exact_mut(BLOCK_BYTES as usize)) {
            fill(self.seed, self.first_block + block as u64, version, bytes);
        }
    }

    /// Compares data that was read with the content that the blocks must have.
    ///
    /// # Errors
    ///
    /// The data differs. The error names the block and describes the data.
    pub fn check(&self, first: usize, found: &[u8]) -> Result<()> {
        let mut expected = vec![0; BLOCK_BYTES as usize];
        for (block, found) in (first..).zip(found.chunks_exact(BLOCK_BYTES as usize)) {
            let version = self.versions[block];
            fill(self.seed, self.first_block + block as u64, version, &mut expected);
            if found == expected {
                continue;
            }
            let different = found.iter().zip(&expected).filter(|(found, expected)| found != expected).count();
            let at = found.iter().zip(&expected).position(|(found, expected)| found != expected).unwrap_or(0);
            bail!(
                "block {} holds version {version}, and {different} bytes of it are different from byte {at} on: {}",
                self.first_block + block as u64,
                self.looks_like(block, found),
            );
        }
        Ok(())
    }

    /// Compares all of the area with the file or device behind the disk.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check), or the file or device cannot be read.
    pub fn check_file(&self, file: &File) -> Result<()> {
        let mut found = vec![0; BLOCK_BYTES as usize];
        for block in 0..self.blocks() {
            file.read_exact_at(&mut found, self.offset_bytes(block)).context("cannot read the disk")?;
            self.check(block, &found)?;
        }
        Ok(())
    }

    /// The older version with this content, for the message of a mismatch.
    fn looks_like(&self, block: usize, found: &[u8]) -> String {
        let mut candidate = vec![0; BLOCK_BYTES as usize];
        for version in 0..self.next_version {
            fill(self.seed, self.first_block + block as u64, version, &mut candidate);
            if candidate == found {
                return format!("it is version {version}");
            }
        }
        let halves = (0..self.next_version).find(|&version| {
            fill(self.seed, self.first_block + block as u64, version, &mut candidate);
            candidate[..512] == found[..512]
        });
        match halves {
            Some(version) => format!("it begins like version {version}"),
            None => format!("it begins with {:02x?}", &found[..16]),
        }
    }
}

fn fill(seed: Seed, block: u64, version: Version, bytes: &mut [u8]) {
    if version == 0 {
        bytes.fill(0);
    } else {
        derive(seed, (block, version)).fill(bytes);
    }
}

fn derive(seed: Seed, part: impl Hash) -> fastrand::Rng {
    seed.derive(part).rng()
}
