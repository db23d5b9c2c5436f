//! The other end of a copy: files and pipes.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::in_use;

const STANDARD: &str = "-";
const STANDARD_OUTPUT: &str = "standard output";

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
        let len_bytes = match found.file_type() {
            kind if kind.is_file() => Some(found.len()),
            kind if kind.is_block_device() => {
                let end = (&file).seek(SeekFrom::End(0)).with_context(|| format!("looking for the end of {name}"))?;
                (&file).rewind().with_context(|| format!("going back to the beginning of {name}"))?;
                Some(end)
            }
            _ => None,
        };
        Ok(Self { reader: Box::new(file), file: again, name, len_bytes })
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
    /// The same, to ask about it.
    file: File,
    is_sparse: bool,
    /// Whether something may have been changed.
    is_begun: bool,
    name: String,
}

impl Output {
    /// # Errors
    ///
    /// It cannot be opened or made.
    pub(crate) fn open(path: &Path, is_sparse: bool) -> Result<Self> {
        if path.as_os_str() == STANDARD {
            ensure!(!is_sparse, "--sparse leaves holes, which only a file can have: give a file");
            let file = io::stdout().as_fd().try_clone_to_owned().context("duplicating standard output")?;
            let (writer, name) = (Box::new(io::stdout().lock()), STANDARD_OUTPUT.into());
            return Ok(Self { writer, file: file.into(), is_sparse, is_begun: false, name });
        }
        let name = path.display().to_string();
        let file = in_use::open_for_writing(path)?;
        let is_file = file.metadata().with_context(|| format!("looking at {name}"))?.is_file();
        ensure!(!is_sparse || is_file, "--sparse leaves holes, which {name} cannot have: it is no regular file");
        let writer = Box::new(file.try_clone().context("duplicating a descriptor")?);
        Ok(Self { writer, file, is_sparse, is_begun: false, name })
    }

    /// The bytes at `offset_bytes` of the output, behind all before.
    pub(crate) fn put(&mut self, _offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        self.begin()?;
        let written = match self.is_sparse && is_zero(bytes) {
            true => self.file.seek(SeekFrom::Current(bytes.len() as i64)).map(drop),
            false => self.writer.write_all(bytes),
        };
        written.with_context(|| format!("writing {}", self.name))
    }

    /// Before the first byte. The server has executed a read by now, and so has its lock on the disk.
    fn begin(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.is_begun, true) {
            return Ok(());
        }
        let found = self.file.metadata().with_context(|| format!("looking at {}", self.name))?;
        if found.is_file() || found.file_type().is_block_device() {
            in_use::check(&self.file, &self.name)?;
        }
        // The shell has seen to standard output, as it was told.
        if found.is_file() && self.name != STANDARD_OUTPUT {
            self.file.set_len(0).with_context(|| format!("emptying {}", self.name))?;
        }
        Ok(())
    }

    /// The length, which a hole at the end does not give.
    pub(crate) fn finish(&mut self, len_bytes: u64) -> Result<()> {
        self.begin()?;
        let finished =
            self.writer.flush().and_then(|()| if self.is_sparse { self.file.set_len(len_bytes) } else { Ok(()) });
        finished.with_context(|| format!("finishing {}", self.name))
    }
}

/// Compares the disk with an input.
pub(crate) struct Comparison<'i> {
    input: &'i mut Input,
    expected: Vec<u8>,
    difference: Option<Difference>,
    compared_bytes: u64,
    /// The input has ended before the disk.
    has_ended: bool,
    /// The input may be shorter or longer than what is compared with it, and that is told.
    may_differ: bool,
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
    /// `is_length_given`: somebody said how much is compared.
    pub(crate) fn new(input: &'i mut Input, is_length_given: bool) -> Self {
        let may_differ = input.len_bytes().is_none() && !is_length_given;
        Self { input, expected: Vec::new(), difference: None, compared_bytes: 0, has_ended: false, may_differ }
    }

    /// The bytes at `disk_offset_bytes`.
    pub(crate) fn look(&mut self, disk_offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        if self.has_ended {
            return Ok(());
        }
        self.expected.resize(bytes.len(), 0);
        let filled = self.input.fill(&mut self.expected)?;
        if filled < bytes.len() {
            let total_bytes = self.compared_bytes + filled as u64;
            ensure!(
                self.may_differ,
                "{} ended after {total_bytes} bytes, before what is to be compared",
                self.input.name()
            );
            self.has_ended = true;
            self.expected.truncate(filled);
        }
        self.compared_bytes += filled as u64;
        let bytes = &bytes[..filled];
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

    /// What was found in the `len_bytes` of the disk that were read, and a remark about an input whose length was not known.
    ///
    /// # Errors
    ///
    /// Such an input is longer than the disk.
    pub(crate) fn finish(self, len_bytes: Option<u64>) -> Result<(Option<Difference>, Option<String>)> {
        let Self { input, compared_bytes, difference, may_differ, .. } = self;
        let Some(len_bytes) = len_bytes.filter(|_| may_differ) else { return Ok((difference, None)) };
        let name = input.name().to_owned();
        if compared_bytes < len_bytes {
            let left_bytes = len_bytes - compared_bytes;
            let remark = format!(
                "{name} has {compared_bytes} bytes: the {left_bytes} bytes of the disk behind them are not compared"
            );
            return Ok((difference, Some(remark)));
        }
        let found = difference.as_ref().map_or_else(|| "which are the same".into(), ToString::to_string);
        ensure!(input.fill(&mut [0])? == 0, "{name} is longer than the {len_bytes} bytes compared with it: {found}");
        Ok((difference, None))
    }
}

/// Whether there is nothing but zeroes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // SAFE and quick: words at a time, and the rest.
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().all(|&word| u64::from_ne_bytes(word) == 0) && rest.iter().all(|&byte| byte == 0)
}
