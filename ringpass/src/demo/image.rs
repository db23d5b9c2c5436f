//! The disk of the demo: a temporary image, or a file or device of the user's, which the demo only reads.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use ringpass_broker::disk::{DirectIo, Disk, DiskConfig, LogicalBlock};
use ringpass_workload::checksum;

use super::leftovers::{self, Leftover};
use super::{AREA_BYTES, BLOCK_BYTES};

/// Maximum number of ways in a demo: each has its own area.
const AREAS: u64 = 8;

/// The demo's disk.
pub(crate) struct Image {
    /// The open, locked disk.
    pub(crate) disk: Arc<Disk>,
    /// The name in the report.
    pub(crate) name: String,
    /// Bytes of each way's own area.
    area_bytes: u64,
    /// Whether the content is the user's and must not change.
    preserved: bool,
    /// The file that the demo created and removes at the end.
    _made: Option<Leftover>,
}

impl Image {
    /// Opens the image that `--blk-file` names, or a temporary image.
    ///
    /// An existing file is opened read-only and does not change. A missing file is created, and removed at the end.
    pub(crate) fn open(blk_file: Option<&Path>, direct_io: DirectIo) -> anyhow::Result<Self> {
        match blk_file {
            Some(path) if path.exists() => Self::preserved(path, direct_io),
            Some(path) => {
                let (file, made) = leftovers::file(path, || {
                    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
                    file.with_context(|| format!("cannot create {}", path.display()))
                })?;
                Self::temporary(file, path.display().to_string(), Some(made), path.to_owned(), direct_io)
            }
            None => {
                let directory = disk_directory()?;
                let file = leftovers::uninterrupted(|| tempfile::tempfile_in(&directory))
                    .with_context(|| format!("cannot create a temporary image in {}", directory.display()))?;
                let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                let name = format!("temporary image in {}", directory.display());
                Self::temporary(file, name, None, path, direct_io)
            }
        }
    }

    fn temporary(
        mut file: File,
        name: String,
        made: Option<Leftover>,
        path: PathBuf,
        direct_io: DirectIo,
    ) -> anyhow::Result<Self> {
        let zeroes = vec![0; 1 << 20];
        for _ in 0..AREAS * AREA_BYTES / zeroes.len() as u64 {
            file.write_all(&zeroes).with_context(|| format!("cannot write {name}"))?;
        }
        let disk = Disk::open(&DiskConfig::new(path).direct_io(direct_io).logical_block(LogicalBlock::DirectIo))?;
        Ok(Self { disk: Arc::new(disk), name, area_bytes: AREA_BYTES, preserved: false, _made: made })
    }

    fn preserved(path: &Path, direct_io: DirectIo) -> anyhow::Result<Self> {
        // The demo's guests read whole blocks and do not interpret the content, so any block size suits.
        let logical_block = LogicalBlock::DirectIo;
        let disk =
            Disk::open(&DiskConfig::new(path).direct_io(direct_io).logical_block(logical_block).read_only(true))?;
        let blocks = (disk.size_bytes() / BLOCK_BYTES).min(AREA_BYTES / BLOCK_BYTES);
        if blocks < 64 {
            bail!(
                "{} has {} bytes: the demo needs at least {}; give a larger file, or a path that does not exist",
                path.display(),
                disk.size_bytes(),
                64 * BLOCK_BYTES
            );
        }
        if BLOCK_BYTES % u64::from(disk.logical_block_bytes()) != 0 {
            bail!(
                "{} has blocks of {} bytes, but the demo reads blocks of {BLOCK_BYTES}: give another --blk-file",
                path.display(),
                disk.logical_block_bytes()
            );
        }
        let name = format!("{} (only read)", path.display());
        Ok(Self { disk: Arc::new(disk), name, area_bytes: blocks * BLOCK_BYTES, preserved: true, _made: None })
    }

    /// Whether the content is the user's, and the demo only reads it.
    pub(crate) fn is_preserved(&self) -> bool {
        self.preserved
    }

    /// Offset and size of the area of way number `index`. If the demo only reads, all ways share one area.
    pub(crate) fn area(&self, index: usize) -> (u64, u64) {
        let offset_bytes = if self.preserved { 0 } else { index as u64 % AREAS * self.area_bytes };
        (offset_bytes, self.area_bytes)
    }

    /// The checksums of an area's blocks, which the host reads through a descriptor of its own. They are 0 (unknown)
    /// for an image that the ways fill themselves.
    pub(crate) fn expected(&self) -> anyhow::Result<Vec<u64>> {
        let blocks = (self.area_bytes / BLOCK_BYTES) as usize;
        if !self.preserved {
            return Ok(vec![0; blocks]);
        }
        let path = self.disk.path();
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut block = vec![0; BLOCK_BYTES as usize];
        (0..blocks as u64)
            .map(|index| {
                std::os::unix::fs::FileExt::read_exact_at(&file, &mut block, index * BLOCK_BYTES)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                Ok(checksum(&block))
            })
            .collect()
    }
}

/// Finds a writable directory on a disk: the demo is about a disk, and `/tmp` is in memory on many systems.
fn disk_directory() -> anyhow::Result<PathBuf> {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    const RAMFS_MAGIC: u64 = 0x8584_58f6;
    let in_memory = |path: &PathBuf| {
        rustix::fs::statfs(path).is_ok_and(|stat| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&(stat.f_type as u64)))
    };
    let writable = |path: &PathBuf| leftovers::uninterrupted(|| tempfile::tempfile_in(path)).is_ok();
    let candidates = [Some(std::env::temp_dir()), Some("/var/tmp".into()), std::env::current_dir().ok()];
    candidates.into_iter().flatten().find(|path| !in_memory(path) && writable(path)).context(
        "no writable directory on a disk ($TMPDIR, /var/tmp, the current directory): give a file with --blk-file",
    )
}
