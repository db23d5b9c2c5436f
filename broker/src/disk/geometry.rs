//! Size and block sizes of an open disk.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{OFlags, SeekFrom, fcntl_getfl, fcntl_setfl, fstat, ioctl_blkpbszget, ioctl_blksszget, seek};

use super::direct_alignment::DirectAlignment;
use super::error::query_error;
use super::open::Found;
use super::{DirectIo, DiskConfig, DiskError, DiskKind, LogicalBlock, SECTOR_BYTES};

/// Network file systems report 1 MiB and more as `st_blksize`: their preferred transfer size, not a unit of writes.
const PHYSICAL_BLOCK_MAX_BYTES: u32 = 64 << 10;

/// What a guest must know of the disk to use it, and what the disk demands of the code that executes the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) size_bytes: u64,
    pub(super) logical_block_bytes: u32,
    pub(super) physical_block_bytes: u32,
    /// `None`: I/O goes through the page cache and needs no alignment.
    pub(super) direct: Option<DirectAlignment>,
}

impl Geometry {
    /// Reads the geometry, and refuses a geometry that no guest could use. Turns `O_DIRECT` off where the file does not
    /// support it.
    pub(super) fn read(found: &Found, config: &DiskConfig) -> Result<Self, DiskError> {
        let geometry = match found.kind {
            DiskKind::RegularFile => Self::of_file(found, config)?,
            DiskKind::BlockDevice => Self::of_device(found, config)?,
        };
        geometry.check(&config.path, found.kind)?;
        Ok(geometry)
    }

    fn of_file(found: &Found, config: &DiskConfig) -> Result<Self, DiskError> {
        let query = |what| move |errno| query_error(&config.path, what, errno);
        let stat = fstat(&found.file).map_err(query("the size"))?;
        let preferred_bytes = u32::try_from(stat.st_blksize).unwrap_or(SECTOR_BYTES);
        let direct =
            if found.direct_io { DirectAlignment::of_file(found, &config.path, preferred_bytes)? } else { None };
        if found.direct_io && direct.is_none() {
            if config.direct_io == DirectIo::On {
                return Err(DiskError::NoDirectIo { path: config.path.clone() });
            }
            let flags = fcntl_getfl(&found.file).map_err(query("the flags"))?;
            fcntl_setfl(&found.file, flags - OFlags::DIRECT).map_err(query("the flags"))?;
        }
        let logical_block_bytes =
            config.logical_block.bytes(SECTOR_BYTES, direct.as_ref(), found.kind, &config.path)?;
        let preferred_bytes = if preferred_bytes.is_power_of_two() { preferred_bytes } else { SECTOR_BYTES };
        let preferred_bytes = preferred_bytes.min(PHYSICAL_BLOCK_MAX_BYTES);
        Ok(Self {
            size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
            logical_block_bytes,
            physical_block_bytes: physical_block(preferred_bytes, logical_block_bytes, direct.as_ref()),
            direct,
        })
    }

    fn of_device(found: &Found, config: &DiskConfig) -> Result<Self, DiskError> {
        let query = |what| move |errno| query_error(&config.path, what, errno);
        let own_bytes = ioctl_blksszget(&found.file).map_err(query("the logical block size"))?;
        let physical_block_bytes = ioctl_blkpbszget(&found.file).map_err(query("the physical block size"))?;
        let direct = found.direct_io.then(|| DirectAlignment::of_device(found, own_bytes));
        let logical_block_bytes = config.logical_block.bytes(own_bytes, direct.as_ref(), found.kind, &config.path)?;
        Ok(Self {
            size_bytes: device_size(&found.file).map_err(query("the size"))?,
            logical_block_bytes,
            physical_block_bytes: physical_block(physical_block_bytes, logical_block_bytes, direct.as_ref()),
            direct,
        })
    }

    /// The current size of the disk in bytes, if a guest could use it; blocks do not change while the disk is open.
    pub(super) fn read_size(&self, file: impl AsFd, path: &Path, kind: DiskKind) -> Result<u64, DiskError> {
        let size_bytes = match kind {
            DiskKind::RegularFile => fstat(file).map(|stat| u64::try_from(stat.st_size).unwrap_or(0)),
            DiskKind::BlockDevice => device_size(file),
        };
        let size_bytes = size_bytes.map_err(|errno| query_error(path, "the size", errno))?;
        Self { size_bytes, ..*self }.check(path, kind)?;
        Ok(size_bytes)
    }

    /// The block of direct I/O for reads or for writes, if the guest's blocks are smaller.
    pub(super) fn finer_than_direct_io(&self, read_only: bool) -> Option<u32> {
        let direct = self.direct?;
        let block_bytes = if read_only { direct.read_block_bytes } else { direct.write_block_bytes };
        (block_bytes > self.logical_block_bytes).then_some(block_bytes)
    }

    fn check(&self, path: &Path, kind: DiskKind) -> Result<(), DiskError> {
        let is_block_device = kind == DiskKind::BlockDevice;
        if self.size_bytes == 0 {
            return Err(DiskError::Empty { path: path.to_owned(), is_block_device });
        }
        if self.size_bytes % u64::from(self.logical_block_bytes) != 0 {
            return Err(DiskError::PartialBlock {
                path: path.to_owned(),
                size_bytes: self.size_bytes,
                logical_block_bytes: self.logical_block_bytes,
                is_block_device,
            });
        }
        Ok(())
    }
}

impl LogicalBlock {
    /// The rule. `own_bytes` is the disk's own block: a sector, or the block of the device.
    fn bytes(
        self,
        own_bytes: u32,
        direct: Option<&DirectAlignment>,
        kind: DiskKind,
        path: &Path,
    ) -> Result<u32, DiskError> {
        match self {
            Self::Own => Ok(own_bytes),
            Self::DirectIo => Ok(direct.map_or(own_bytes, |direct| direct.write_block_bytes.max(own_bytes))),
            Self::Bytes(bytes) if bytes.is_power_of_two() && bytes >= own_bytes => Ok(bytes),
            Self::Bytes(wanted_bytes) => Err(DiskError::LogicalBlock {
                path: path.to_owned(),
                wanted_bytes,
                own_bytes,
                is_block_device: kind == DiskKind::BlockDevice,
            }),
        }
    }
}

fn device_size(file: impl AsFd) -> rustix::io::Result<u64> {
    // The end of a block device is the size that BLKGETSIZE64 reports; seeking needs no raw ioctl. Nothing uses the
    // file position that this moves: rings name an offset in each request.
    seek(file, SeekFrom::End(0))
}

/// The unit in which a guest should write: a guest that keeps to it never causes a read before a write.
fn physical_block(preferred_bytes: u32, logical_block_bytes: u32, direct: Option<&DirectAlignment>) -> u32 {
    let direct_bytes = direct.map_or(logical_block_bytes, |direct| direct.write_block_bytes);
    preferred_bytes.max(logical_block_bytes).max(direct_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn direct(read_block_bytes: u32, write_block_bytes: u32) -> DirectAlignment {
        DirectAlignment { read_block_bytes, write_block_bytes, memory_bytes: 512 }
    }

    fn logical(block: LogicalBlock, own_bytes: u32, direct: Option<DirectAlignment>) -> u32 {
        block.bytes(own_bytes, direct.as_ref(), DiskKind::RegularFile, Path::new("d.img")).unwrap()
    }

    #[test]
    fn the_logical_block_is_the_disks_own_for_every_demand_of_direct_io() {
        for direct in [None, Some(direct(512, 512)), Some(direct(512, 4096)), Some(direct(4096, 4096))] {
            assert_eq!(logical(LogicalBlock::Own, 512, direct), 512);
            assert_eq!(logical(LogicalBlock::Own, 4096, direct), 4096);
            assert_eq!(logical(LogicalBlock::Bytes(512), 512, direct), 512);
            assert_eq!(logical(LogicalBlock::Bytes(4096), 512, direct), 4096);
            assert_eq!(logical(LogicalBlock::Bytes(65536), 4096, direct), 65536);
        }
    }

    #[test]
    fn a_disk_without_data_can_use_the_blocks_of_direct_io() {
        assert_eq!(logical(LogicalBlock::DirectIo, 512, None), 512);
        assert_eq!(logical(LogicalBlock::DirectIo, 512, Some(direct(512, 4096))), 4096);
        assert_eq!(logical(LogicalBlock::DirectIo, 4096, Some(direct(512, 512))), 4096);
    }

    #[test]
    fn blocks_smaller_than_those_of_a_device_are_refused() {
        let block = LogicalBlock::Bytes(512);
        let refused = block.bytes(4096, None, DiskKind::BlockDevice, Path::new("/dev/x")).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "a logical block of 512 bytes is not possible on \"/dev/x\": the device has blocks of 4096 bytes. Use 4096 or \
             a larger power of two, or leave it out"
        );
        let block = LogicalBlock::Bytes(3 * 512);
        let refused = block.bytes(512, None, DiskKind::RegularFile, Path::new("d.img")).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "a logical block of 1536 bytes is not possible on \"d.img\": use 512 or a larger power of two, or leave it out"
        );
    }

    #[test]
    fn the_physical_block_covers_the_logical_block_and_the_block_of_direct_io() {
        assert_eq!(physical_block(4096, 512, None), 4096);
        assert_eq!(physical_block(512, 4096, None), 4096);
        assert_eq!(physical_block(512, 512, Some(&direct(512, 4096))), 4096);
        assert_eq!(physical_block(4096, 512, Some(&direct(512, 512))), 4096);
    }

    #[test]
    fn only_blocks_below_those_of_direct_io_are_finer() {
        let finer = |logical_block_bytes, direct, read_only| {
            let geometry = Geometry { size_bytes: 1 << 20, logical_block_bytes, physical_block_bytes: 4096, direct };
            geometry.finer_than_direct_io(read_only)
        };
        assert_eq!(finer(512, None, false), None);
        assert_eq!(finer(512, Some(direct(512, 512)), false), None);
        assert_eq!(finer(4096, Some(direct(512, 4096)), false), None);
        assert_eq!(finer(512, Some(direct(512, 4096)), false), Some(4096));
        assert_eq!(finer(512, Some(direct(512, 4096)), true), None);
        assert_eq!(finer(512, Some(direct(4096, 8192)), true), Some(4096));
    }

    #[test]
    fn a_device_with_a_partial_last_block_is_refused() {
        let geometry = Geometry {
            size_bytes: 4096 * 3 + 512,
            logical_block_bytes: 4096,
            physical_block_bytes: 4096,
            direct: Some(direct(512, 4096)),
        };
        let refused = geometry.check(Path::new("/dev/x"), DiskKind::BlockDevice).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "disk \"/dev/x\" has 12800 bytes, which is not a multiple of its 4096-byte blocks: a guest could not \
             reach the last 512. Change the size of the device"
        );
    }
}
