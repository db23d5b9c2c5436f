//! The RAM of a guest, in a file. Positions in the file are guest-physical addresses.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use anyhow::{Context, Result};

#[derive(Debug)]
pub(super) struct Ram(File);

impl Ram {
    pub(super) fn open(path: &Path) -> Result<Self> {
        File::options().read(true).write(true).open(path).map(Self).context("cannot open the guest's RAM")
    }

    pub(super) fn read<const N: usize>(&self, gpa: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact_at(&mut bytes, gpa)?;
        Ok(bytes)
    }

    pub(super) fn read_into(&self, gpa: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, gpa)
    }

    pub(super) fn read_u16(&self, gpa: u64) -> io::Result<u16> {
        self.read(gpa).map(u16::from_le_bytes)
    }

    pub(super) fn read_u32(&self, gpa: u64) -> io::Result<u32> {
        self.read(gpa).map(u32::from_le_bytes)
    }

    pub(super) fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, gpa)
    }
}
