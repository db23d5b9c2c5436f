//! The other end of a copy: a file or a pipe.

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

/// The source of the bytes.
pub(crate) struct Input {
    reader: Box<dyn Read>,
    /// The same file, to read it a second time.
    file: Option<File>,
    name: String,
    len_bytes: Option<u64>,
}

impl Input {
    /// # Errors
    ///
    /// The input cannot be opened, or cannot be read twice although `--verify` needs that.
    pub(crate) fn open((path, is_read_twice): (&Path, bool)) -> Result<Self> {
        if path.as_os_str() == STANDARD {
            ensure!(!is_read_twice, "--verify reads the input twice, but standard input can be read once: give a file");
            return Ok(Self {
                reader: Box::new(io::stdin().lock()),
                file: None,
                name: "standard input".into(),
                len_bytes: None,
            });
        }
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
        let found = file.metadata().with_context(|| format!("cannot examine {name}"))?;
        ensure!(!found.is_dir(), "{name} is a directory: give a file");
        ensure!(found.is_file() || !is_read_twice, "--verify reads the input twice, but {name} is not a regular file");
        let again =
            if found.is_file() { Some(file.try_clone().context("cannot duplicate a descriptor")?) } else { None };
        let len_bytes = match found.file_type() {
            kind if kind.is_file() => Some(found.len()),
            kind if kind.is_block_device() => {
                let end = (&file).seek(SeekFrom::End(0)).with_context(|| format!("cannot find the end of {name}"))?;
                (&file).rewind().with_context(|| format!("cannot go back to the start of {name}"))?;
                Some(end)
            }
            _ => None,
        };
        Ok(Self { reader: Box::new(file), file: again, name, len_bytes })
    }

    /// The length of the input. `None`: unknown before its end.
    pub(crate) fn len_bytes(&self) -> Option<u64> {
        self.len_bytes
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Goes back to the start.
    pub(crate) fn rewind(&mut self) -> Result<()> {
        let file = self.file.as_mut().context("only a file is read twice")?;
        file.seek(SeekFrom::Start(0)).map(drop).with_context(|| format!("cannot go back to the start of {}", self.name))
    }

    /// Fills the buffer, or the part of it for which the input has bytes.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.reader.read(&mut bytes[filled..]) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).with_context(|| format!("cannot read {}", self.name)),
            }
        }
        Ok(filled)
    }
}

/// The destination of the bytes, which it gets in order.
pub(crate) struct Output {
    writer: Box<dyn Write>,
    /// The same file, for its metadata.
    file: File,
    is_sparse: bool,
    /// Whether the output may have changed.
    is_begun: bool,
    name: String,
}

impl Output {
    /// # Errors
    ///
    /// The output cannot be opened or created.
    pub(crate) fn open(path: &Path, is_sparse: bool) -> Result<Self> {
        if path.as_os_str() == STANDARD {
            ensure!(!is_sparse, "--sparse leaves holes, but only a file can have holes: give a file");
            let file = io::stdout().as_fd().try_clone_to_owned().context("cannot duplicate standard output")?;
            let (writer, name) = (Box::new(io::stdout().lock()), STANDARD_OUTPUT.into());
            return Ok(Self { writer, file: file.into(), is_sparse, is_begun: false, name });
        }
        let name = path.display().to_string();
        let file = in_use::open_for_writing(path)?;
        let is_file = file.metadata().with_context(|| format!("cannot examine {name}"))?.is_file();
        ensure!(!is_sparse || is_file, "--sparse leaves holes, but {name} is not a regular file and cannot have holes");
        let writer = Box::new(file.try_clone().context("cannot duplicate a descriptor")?);
        Ok(Self { writer, file, is_sparse, is_begun: false, name })
    }

    /// Writes the bytes at `offset_bytes` of the output, directly after the previous bytes.
    pub(crate) fn put(&mut self, _offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        self.begin()?;
        let written = match self.is_sparse && is_zero(bytes) {
            true => self.file.seek(SeekFrom::Current(bytes.len() as i64)).map(drop),
            false => self.writer.write_all(bytes),
        };
        written.with_context(|| format!("cannot write {}", self.name))
    }

    /// Prepares the output before the first byte. By now the server has executed a read, so it holds its lock on the
    /// disk.
    fn begin(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.is_begun, true) {
            return Ok(());
        }
        let found = self.file.metadata().with_context(|| format!("cannot examine {}", self.name))?;
        if found.is_file() || found.file_type().is_block_device() {
            in_use::check(&self.file, &self.name)?;
        }
        // The shell has opened standard output as the user wanted, so the program does not truncate it.
        if found.is_file() && self.name != STANDARD_OUTPUT {
            self.file.set_len(0).with_context(|| format!("cannot truncate {}", self.name))?;
        }
        Ok(())
    }

    /// Sets the length of the output, because a hole at the end does not extend a file.
    pub(crate) fn finish(&mut self, len_bytes: u64) -> Result<()> {
        self.begin()?;
        let finished =
            self.writer.flush().and_then(|()| if self.is_sparse { self.file.set_len(len_bytes) } else { Ok(()) });
        finished.with_context(|| format!("cannot finish {}", self.name))
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
    /// The input may be shorter or longer than the compared part of the disk; the program then reports that.
    may_differ: bool,
}

/// A difference between disk and input.
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
            "the disk differs from {input} in {count_bytes} bytes; the first is at byte {first_bytes} of the disk: the disk has \
             {found:#04x}, the input has {expected:#04x}"
        )
    }
}

impl<'i> Comparison<'i> {
    /// `is_length_given`: the user has given the length to compare.
    pub(crate) fn new(input: &'i mut Input, is_length_given: bool) -> Self {
        let may_differ = input.len_bytes().is_none() && !is_length_given;
        Self { input, expected: Vec::new(), difference: None, compared_bytes: 0, has_ended: false, may_differ }
    }

    /// Compares the bytes at `disk_offset_bytes` with the next bytes of the input.
    pub(crate) fn compare(&mut self, disk_offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        if self.has_ended {
            return Ok(());
        }
        self.expected.resize(bytes.len(), 0);
        let filled = self.input.fill(&mut self.expected)?;
        if filled < bytes.len() {
            let total_bytes = self.compared_bytes + filled as u64;
            ensure!(
                self.may_differ,
                "{} ended after {total_bytes} bytes, before the end of the range to compare",
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

    /// Returns the difference in the `len_bytes` of the disk that were read, and a remark about an input of unknown
    /// length that is shorter.
    ///
    /// # Errors
    ///
    /// An input of unknown length is longer than the disk.
    pub(crate) fn finish(self, len_bytes: Option<u64>) -> Result<(Option<Difference>, Option<String>)> {
        let Self { input, compared_bytes, difference, may_differ, .. } = self;
        let Some(len_bytes) = len_bytes.filter(|_| may_differ) else { return Ok((difference, None)) };
        let name = input.name().to_owned();
        if compared_bytes < len_bytes {
            let left_bytes = len_bytes - compared_bytes;
            let remark = format!(
                "{name} has {compared_bytes} bytes: the {left_bytes} bytes of the disk after them are not compared"
            );
            return Ok((difference, Some(remark)));
        }
        let found = difference.as_ref().map_or_else(|| "these are the same".into(), ToString::to_string);
        ensure!(input.fill(&mut [0])? == 0, "{name} is longer than the {len_bytes} bytes compared with it: {found}");
        Ok((difference, None))
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Safe and fast: a word at a time, then the rest.
    let mut words = bytes.chunks_exact(8);
    words.by_ref().all(|word| word == [0; 8]) && words.remainder().iter().all(|&byte| byte == 0)
}
