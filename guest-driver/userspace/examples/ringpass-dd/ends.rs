//! The other end of a copy: files and pipes.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};

const STANDARD: &str = "-";

/// Where bytes come from.
pub(crate) struct Input {
    reader: Box<dyn Read>,
    /// To read it once more.
    file: Option<File>,
    name: String,
    len_bytes: Option<u64>,
}

impl Input {
    /// # Errors
    ///
    /// It cannot be opened, or not be read twice though it must.
    pub(crate) fn open((path, is_read_twice): (&Path, bool)) -> Result<Self> {
        if path.as_os_str() == STANDARD {
            ensure!(!is_read_twice, "--verify reads the input twice, which standard input does not do: give a file");
            return Ok(Self {
                reader: Box::new(io::stdin().lock()),
                file: None,
                name: "standard input".into(),
                len_bytes: None,
            });
        }
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("opening {name}"))?;
        let found = file.metadata().with_context(|| format!("looking at {name}"))?;
        ensure!(!found.is_dir(), "{name} is a directory");
        ensure!(found.is_file() || !is_read_twice, "--verify reads the input twice, and {name} is no regular file");
        let again = if found.is_file() { Some(file.try_clone().context("duplicating a descriptor")?) } else { None };
        Ok(Self { reader: Box::new(file), file: again, name, len_bytes: found.is_file().then_some(found.len()) })
    }

    /// How much there is. `None`: nobody knows before its end.
    pub(crate) fn len_bytes(&self) -> Option<u64> {
        self.len_bytes
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// From the beginning again.
    pub(crate) fn rewind(&mut self) -> Result<()> {
        let file = self.file.as_mut().context("only a file is read twice")?;
        file.seek(SeekFrom::Start(0)).map(drop).with_context(|| format!("going back to the beginning of {}", self.name))
    }

    /// Fills the buffer, or as much of it as there is before the end.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.reader.read(&mut bytes[filled..]) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).with_context(|| format!("reading {}", self.name)),
            }
        }
        Ok(filled)
    }
}

/// Where bytes go, in order.
pub(crate) struct Output {
    writer: Box<dyn Write>,
    /// With holes for zeroes.
    sparse: Option<File>,
    name: String,
}

impl Output {
    /// # Errors
    ///
    /// It cannot be made.
    pub(crate) fn create(path: &Path, sparse: bool) -> Result<Self> {
        if path.as_os_str() == STANDARD {
            ensure!(!sparse, "--sparse leaves holes, which only a file can have: give a file");
            return Ok(Self { writer: Box::new(io::stdout().lock()), sparse: None, name: "standard output".into() });
        }
        let name = path.display().to_string();
        let file = File::create(path).with_context(|| format!("making {name}"))?;
        let is_file = file.metadata().with_context(|| format!("looking at {name}"))?.is_file();
        ensure!(!sparse || is_file, "--sparse leaves holes, which {name} cannot have: it is no regular file");
        let holes = if sparse { Some(file.try_clone().context("duplicating a descriptor")?) } else { None };
        Ok(Self { writer: Box::new(file), sparse: holes, name })
    }

    /// The bytes at `offset_bytes` of the output, behind all before.
    pub(crate) fn put(&mut self, _offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        let written = match &mut self.sparse {
            Some(file) if is_zero(bytes) => file.seek(SeekFrom::Current(bytes.len() as i64)).map(drop),
            _ => self.writer.write_all(bytes),
        };
        written.with_context(|| format!("writing {}", self.name))
    }

    /// The length, which a hole at the end does not give.
    pub(crate) fn finish(&mut self, len_bytes: u64) -> Result<()> {
        let finished = self.writer.flush().and_then(|()| match &self.sparse {
            Some(file) => file.set_len(len_bytes),
            None => Ok(()),
        });
        finished.with_context(|| format!("finishing {}", self.name))
    }
}

/// Compares the disk with an input.
pub(crate) struct Comparison<'i> {
    input: &'i mut Input,
    expected: Vec<u8>,
    difference: Option<Difference>,
}

/// Where disk and input are not the same.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    input: String,
    first_bytes: u64,
    found: u8,
    expected: u8,
    count_bytes: u64,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { input, first_bytes, found, expected, count_bytes } = self;
        write!(
            f,
            "the disk differs from {input} in {count_bytes} bytes; the first is at {first_bytes} of the disk: it has \
             {found:#04x}, the input {expected:#04x}"
        )
    }
}

impl<'i> Comparison<'i> {
    pub(crate) fn new(input: &'i mut Input) -> Self {
        Self { input, expected: Vec::new(), difference: None }
    }

    /// The bytes at `disk_offset_bytes`.
    pub(crate) fn look(&mut self, disk_offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        self.expected.resize(bytes.len(), 0);
        let filled = self.input.fill(&mut self.expected)?;
        ensure!(filled == bytes.len(), "{} has become shorter", self.input.name());
        if self.expected == bytes {
            return Ok(());
        }
        let pairs = bytes.iter().zip(&self.expected).enumerate();
        for (at, (&found, &expected)) in pairs.filter(|(_, (found, expected))| found != expected) {
            let difference = self.difference.get_or_insert_with(|| Difference {
                input: self.input.name().into(),
                first_bytes: disk_offset_bytes + at as u64,
                found,
                expected,
                count_bytes: 0,
            });
            difference.count_bytes += 1;
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> Option<Difference> {
        self.difference
    }
}

/// Whether there is nothing but zeroes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // SAFE and quick: words at a time, and the rest.
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().all(|&word| u64::from_ne_bytes(word) == 0) && rest.iter().all(|&byte| byte == 0)
}
