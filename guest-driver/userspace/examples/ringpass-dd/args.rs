//! The command line.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use ringpass_guest::vhost_user::Way;

/// Longer requests gain nothing, and a server may split them.
const BLOCK_BYTES_MAX: u64 = 4 << 20;

/// Copy to and from a disk that `ringpass serve` serves.
///
/// Exit status: 0 on success, 1 if contents differ, 2 on failure.
#[derive(Debug, Parser)]
#[command(name = "ringpass-dd", version)]
pub(crate) struct Arguments {
    /// The server's socket. A server serves one front-end at a time, so no virtual machine may be connected.
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,

    /// Start position on the disk in bytes, or with the unit KiB, MiB or GiB.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = bytes, global = true)]
    pub(crate) offset_bytes: u64,

    /// Number of bytes to copy or compare [default: to the end of the disk, or of the input].
    #[arg(long, value_name = "BYTES", value_parser = bytes, global = true)]
    pub(crate) length_bytes: Option<u64>,

    /// Length of a request.
    #[arg(long, value_name = "BYTES", default_value = "256KiB", value_parser = bytes, global = true)]
    block_bytes: u64,

    /// Number of requests under way on each queue.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=128), global = true)]
    pub(crate) depth: u16,

    /// Number of queues; fewer if the disk has fewer in addition to its first queue.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64), global = true)]
    pub(crate) queues: u16,

    /// How the queues are executed: rings if the disk offers them, rings only, or virtqueues only.
    #[arg(long, value_enum, value_name = "WAY", default_value_t = WayArg::Auto, global = true)]
    pub(crate) way: WayArg,

    /// Whether to sleep until a request ends, or to poll.
    #[arg(long, value_enum, value_name = "HOW", default_value_t = WaitArg::Interrupt, global = true)]
    pub(crate) wait: WaitArg,

    /// How long to wait for a server that does not answer before the program fails, in seconds. The server may not have
    /// started yet, may be restarting, or may have another front-end.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400), global = true)]
    pub(crate) patience_s: u64,

    /// Show no progress bar.
    #[arg(long, global = true)]
    pub(crate) no_progress: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Read the disk.
    Read {
        /// File or block device, or `-` for standard output. The program refuses a file that is in use, such as the
        /// disk itself.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// Leave holes in the file where the disk has zeroes.
        #[arg(long)]
        sparse: bool,
    },
    /// Write the disk.
    Write {
        /// File, or `-` for standard input.
        #[arg(long, value_name = "FILE")]
        input: PathBuf,
        /// Read the written data back and compare it.
        #[arg(long)]
        verify: bool,
        /// Where the input has zeroes, ask the disk to free the space instead of writing zeroes, if the disk supports
        /// that.
        #[arg(long)]
        sparse: bool,
    },
    /// Compare the disk with a file.
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
    /// Sleep until an interrupt.
    Interrupt,
    /// Poll.
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
    /// The input, and whether the program reads it twice.
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
    /// The option is missing.
    pub(crate) fn socket(&self) -> Result<&Path> {
        self.socket.as_deref().context("--socket is missing: give the path that `ringpass serve` got as --socket-path")
    }

    pub(crate) fn block_bytes_wanted(&self) -> u64 {
        self.block_bytes.clamp(4096, BLOCK_BYTES_MAX).next_multiple_of(4096)
    }

    /// The length of a request, checked against the disk's block size.
    pub(crate) fn block_bytes(&self, logical_block_bytes: u32) -> Result<u64> {
        ensure!(
            (1..=BLOCK_BYTES_MAX).contains(&self.block_bytes)
                && self.block_bytes.checked_rem(u64::from(logical_block_bytes)) == Some(0),
            "--block-bytes {} must be a multiple of the disk's block size, {logical_block_bytes} bytes, and at most 4 MiB",
            self.block_bytes
        );
        Ok(self.block_bytes)
    }
}

/// Parses a number of bytes, with or without a unit.
fn bytes(text: &str) -> Result<u64, String> {
    let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1_u64 << 30)];
    let found = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)));
    let (number, unit) = found.unwrap_or((text, 1));
    let bytes = number.trim().parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    bytes.ok_or_else(|| "must be a number of bytes, for example 65536, 64KiB or 10GiB".into())
}
