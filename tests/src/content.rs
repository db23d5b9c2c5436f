//! Compares the content of a disk, read past the rings, with what a guest says that it wrote.

use std::{fs::File, os::unix::fs::FileExt};

use anyhow::{Result, ensure};
use ringpass_workload::{Job, checksum};

/// Checks that the disk holds what the guest wrote. `expected` has the checksums of the job's blocks, and `beside` is
/// the disk's file or device, which the test has opened itself.
///
/// # Errors
///
/// A block has another content, or cannot be read. The error names the first one.
pub fn check_content(beside: &File, job: &Job, expected: &[u64]) -> Result<()> {
    let mut block = vec![0; job.block_bytes as usize];
    for (index, &expected) in (0u64..).zip(expected) {
        let offset_bytes = job.area_offset_bytes + index * u64::from(job.block_bytes);
        beside.read_exact_at(&mut block, offset_bytes)?;
        ensure!(checksum(&block) == expected, "the disk has other data in block {index}, at {offset_bytes}");
    }
    Ok(())
}
