//! The command line.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use ringpass_guest::vhost_user::Way;

/// Longer requests gain nothing, and a server may have them cut.
const BLOCK_BYTES_MAX: u64 = 4 << 20;

/// Copies to and from a disk that `ringpass serve` serves.
///
/// Exit status: 0, or 1 if contents differ, or 2 if something failed.
#[derive(Debug, Parser)]
#[command(name = "ringpass-dd", version)]
pub(crate) struct Arguments {
    /// The server's socket. A server has one front-end at a time: no virtual machine may use it.
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,

    /// Where on the disk to begin, in bytes; KiB, MiB and GiB are understood.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = bytes, global = true)]
    pub(crate) offset_bytes: u64,

    /// How much [default: to the end of the disk, or of the input].
    #[arg(long, value_name = "BYTES", value_parser = bytes, global = true)]
    pub(crate) length_bytes: Option<u64>,

    /// Length of a request.
    #[arg(long, value_name = "BYTES", default_value = "256KiB", value_parser = bytes, global = true)]
    block_bytes: u64,

    /// Requests under way on each queue.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=128), global = true)]
    pub(crate) depth: u16,

    /// Queues, if the disk has as many besides its first one.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64), global = true)]
    pub(crate) queues: u16,

    /// Rings if the disk offers them, rings only, or virtqueues only.
    #[arg(long, value_enum, value_name = "WAY", default_value_t = WayArg::Auto, global = true)]
    pub(crate) way: WayArg,

    /// Whether to sleep until requests end, or to look all the time.
    #[arg(long, value_enum, value_name = "HOW", default_value_t = WaitArg::Interrupt, global = true)]
    pub(crate) wait: WaitArg,

    /// How long nothing may come from the server before giving up, in seconds. It may not have started yet, be restarting, or have
    /// another front-end.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400), global = true)]
    pub(crate) patience_s: u64,

    /// Say nothing before the end.
    #[arg(long, global = true)]
    pub(crate) no_progress: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Reads the disk.
    Read {
        /// File or block device, or `-` for standard output. What is in use (the disk that is read, above all) is refused.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// Leave holes in the file where the disk has zeroes.
        #[arg(long)]
        sparse: bool,
    },
    /// Writes the disk.
    Write {
        /// File, or `-` for standard input.
        #[arg(long, value_name = "FILE")]
        input: PathBuf,
        /// Read what was written and compare.
        #[arg(long)]
        verify: bool,
        /// Where the input has zeroes, have the disk give space back instead of writing them, if it can.
        #[arg(long)]
        sparse: bool,
    },
    /// Compares the disk with a file.
    Verify {
        /// File, or `-` for standard input.
        #[arg(long, value_name = "FILE")]
        input: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WayArg {
    Auto,
    Ring,
    Virtqueue,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WaitArg {
    /// Sleep.
    Interrupt,
    /// Look.
    Poll,
}

impl From<WayArg> for Way {
    fn from(way: WayArg) -> Self {
        match way {
            WayArg::Auto => Self::Auto,
            WayArg::Ring => Self::Ring,
            WayArg::Virtqueue => Self::Virtqueue,
        }
    }
}

impl Command {
    /// The input, and whether it must be read twice.
    pub(crate) fn input(&self) -> Option<(&Path, bool)> {
        match self {
            Self::Read { .. } => None,
            Self::Write { input, verify, .. } => Some((input, *verify)),
            Self::Verify { input } => Some((input, false)),
        }
    }
}

impl Arguments {
    /// # Errors
    ///
    /// It was not given.
    pub(crate) fn socket(&self) -> Result<&Path> {
        self.socket.as_deref().context("--socket is missing: the path that `ringpass serve` was given as --socket-path")
    }

    pub(crate) fn block_bytes_wanted(&self) -> u64 {
        self.block_bytes.clamp(4096, BLOCK_BYTES_MAX).next_multiple_of(4096)
    }

    /// The length of a request, which the disk can do.
    pub(crate) fn block_bytes(&self, logical_block_bytes: u32) -> Result<u64> {
        ensure!(
            (1..=BLOCK_BYTES_MAX).contains(&self.block_bytes)
                && self.block_bytes.is_multiple_of(logical_block_bytes.into()),
            "--block-bytes {} must be a multiple of the disk's block of {logical_block_bytes} bytes, and at most 4 MiB",
            self.block_bytes
        );
        Ok(self.block_bytes)
    }
}

/// A number of bytes, with or without a unit.
fn bytes(text: &str) -> Result<u64, String> {
    let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1_u64 << 30)];
    let found = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)));
    let (number, unit) = found.unwrap_or((text, 1));
    let bytes = number.trim().parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    bytes.ok_or_else(|| "must be a number of bytes, such as 65536, 64KiB or 10GiB".into())
}
