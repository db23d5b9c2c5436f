//! Memory and files beside a hostile guest, which must not change.

use std::{
    fs::File,
    io::Seek,
    os::unix::fs::FileExt,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use memmap2::MmapMut;

/// The number of files: so many that they have most of the low descriptors, which the script names.
const CANARY_FILES: usize = 48;
const CANARY_BYTES: usize = 256 << 10;

/// Memory and files of the broker that no guest may reach.
#[derive(Debug)]
pub struct Canaries {
    /// The files, each with the time of its last write: a guest may write the same bytes that it has just read there.
    files: Vec<(File, SystemTime)>,
    pages: MmapMut,
}

impl Canaries {
    /// Opens the files, which get the first free descriptors, and fills the pages.
    ///
    /// # Errors
    ///
    /// No space.
    pub fn new() -> Result<Self> {
        let content = pattern(20, CANARY_BYTES);
        let file = || {
            let file = tempfile::tempfile()?;
            file.write_all_at(&content, 0)?;
            // The times are so old that the clock of any file system shows a difference.
            let written = SystemTime::now() - Duration::from_secs(3600);
            file.set_modified(written)?;
            Ok::<_, anyhow::Error>((file, written))
        };
        let files = (0..CANARY_FILES).map(|_| file()).collect::<Result<_, _>>()?;
        let mut pages = MmapMut::map_anon(CANARY_BYTES)?;
        pages.copy_from_slice(&content);
        Ok(Self { files, pages })
    }

    /// An address in the middle of the pages.
    pub fn address(&self) -> u64 {
        self.pages.as_ptr().addr() as u64 + CANARY_BYTES as u64 / 2
    }

    /// The current content of the pages. Each file has the same content as long as nothing is damaged.
    pub fn content(&self) -> &[u8] {
        &self.pages
    }

    /// A line of text for each change.
    ///
    /// # Errors
    ///
    /// A file cannot be read.
    pub fn damage(&self) -> Result<Vec<String>> {
        let content = pattern(20, CANARY_BYTES);
        let mut damage = Vec::new();
        for (index, (mut file, written)) in (0..).zip(self.files.iter().map(|(file, written)| (file, written))) {
            let mut now = vec![0; CANARY_BYTES];
            file.read_exact_at(&mut now, 0)?;
            let about = file.metadata()?;
            let is_same = now == content
                && about.len() == CANARY_BYTES as u64
                && about.modified()?.duration_since(*written).is_ok_and(|later| later < Duration::from_secs(60))
                && file.stream_position()? == 0;
            if !is_same {
                damage.push(format!("damage: file {index} of the broker"));
            }
        }
        if self.pages[..] != content[..] {
            damage.push("damage: memory of the broker".to_owned());
        }
        Ok(damage)
    }
}

/// Bytes that differ with the seed and do not repeat within a page.
pub fn pattern(seed: u64, len_bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len_bytes];
    random.fill(&mut bytes);
    bytes
}
