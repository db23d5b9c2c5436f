//! Copies to and from a disk that `ringpass serve` serves, through rings of the host's io_uring, without a virtual
//! machine.
//!
//! ```console
//! $ ringpass-dd --socket /run/vm1.sock read  --output backup.img
//! $ ringpass-dd --socket /run/vm1.sock write --input backup.img --verify
//! $ ringpass-dd --socket /run/vm1.sock verify --input backup.img
//! ```
//!
//! The program is also an example of how to use `ringpass_guest::vhost_user`: `transfer.rs` keeps several queues busy
//! with buffers of the driver, and continues when the server restarts.

mod args;
mod ends;
mod in_use;
mod interrupt;
mod limits;
mod progress;
mod transfer;
mod waiting;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};
use clap::Parser;
use ringpass_guest::vhost_user::{Disk, Options, RingSize};

use args::{Arguments, Command};
use ends::{Comparison, Input, Output};
use progress::Progress;
use transfer::{Direction, Range, Transfer, report_rest};
use waiting::Notice;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ringpass-dd: {}", one_line(&error));
            // Status 1 means that contents differ.
            ExitCode::from(2)
        }
    }
}

/// The error and its causes, each once: the driver's messages contain their causes already.
fn one_line(error: &Error) -> String {
    let causes = error.chain().map(ToString::to_string);
    let line = causes.reduce(|line, cause| if line.contains(&cause) { line } else { format!("{line}: {cause}") });
    line.unwrap_or_default()
}

/// Returns false if the contents differ.
fn run(arguments: &Arguments) -> Result<bool> {
    interrupt::watch()?;
    let socket = arguments.socket()?;
    limits::make_room(arguments.queues)?;
    // Open the input before the connection, so that a wrong input changes nothing.
    let mut input = arguments.command.input().map(Input::open).transpose()?;
    let disk = waiting::connect(socket, options(arguments))?;
    let is_same = copy(arguments, &disk, input.as_mut());
    let _notice = Notice::later(format!("waiting up to {} s for the server to stop its queues", arguments.patience_s));
    match disk.close() {
        // The copy is complete, so this is only a warning.
        Err(error) if is_same.is_ok() => eprintln!("ringpass-dd: {error}"),
        _ => {}
    }
    is_same
}

fn copy(arguments: &Arguments, disk: &Disk, input: Option<&mut Input>) -> Result<bool> {
    let block_bytes = arguments.block_bytes(disk.geometry().logical_block_bytes)?;
    let range = Range::checked(arguments, disk.geometry(), input.as_deref())?;
    let mut transfer = Transfer::new(disk, arguments, block_bytes)?;
    match (&arguments.command, input) {
        (Command::Read { output, sparse }, _) => {
            let mut output = Output::open(output, *sparse)?;
            let progress = Progress::new(arguments, "reading", range.len_bytes);
            transfer.run(range, Direction::FromDisk(&mut |offset, bytes| output.put(offset, bytes)), &progress)?;
            output.finish(transfer.moved_bytes())?;
            progress.finish("read", &transfer);
            Ok(true)
        }
        (Command::Write { verify, sparse, .. }, Some(input)) => {
            write(arguments, disk, &mut transfer, range, input, *sparse)?;
            if !verify {
                return Ok(true);
            }
            input.rewind()?;
            let written = Range { offset_bytes: range.offset_bytes, len_bytes: Some(transfer.moved_bytes()) };
            compare(arguments, &mut transfer, written, input)
        }
        (Command::Verify { .. }, Some(input)) => compare(arguments, &mut transfer, range, input),
        (Command::Write { .. } | Command::Verify { .. }, None) => bail!("clap demands an input"),
    }
}

fn write(
    arguments: &Arguments,
    disk: &Disk,
    transfer: &mut Transfer<'_>,
    range: Range,
    input: &mut Input,
    sparse: bool,
) -> Result<()> {
    let progress = Progress::new(arguments, "writing", range.len_bytes);
    let mut fill = |bytes: &mut [u8]| input.fill(bytes);
    transfer.run(range, Direction::ToDisk { fill: &mut fill, zeroes: sparse.then_some(disk) }, &progress)?;
    // Success must mean that the data is stable.
    let notice = Notice::later(format!("waiting up to {} s for a flush", arguments.patience_s));
    disk.flush().context("cannot flush the disk")?;
    drop(notice);
    progress.finish("wrote", transfer);
    let (moved_bytes, size_bytes) = (transfer.moved_bytes(), disk.geometry().size_bytes);
    ensure!(
        !transfer.is_input_longer(),
        "{} is longer than the disk: the disk has {size_bytes} bytes; the first {moved_bytes} bytes of the input are written",
        input.name()
    );
    let left_bytes = size_bytes - range.offset_bytes;
    if range.len_bytes.is_none() && moved_bytes < left_bytes {
        report_rest(&arguments.command, input.name(), moved_bytes, left_bytes);
    }
    Ok(())
}

fn compare(arguments: &Arguments, transfer: &mut Transfer<'_>, range: Range, input: &mut Input) -> Result<bool> {
    let progress = Progress::new(arguments, "comparing", range.len_bytes);
    let mut comparison = Comparison::new(input, arguments.length_bytes.is_some());
    let start_bytes = range.offset_bytes;
    transfer.run(
        range,
        Direction::FromDisk(&mut |offset, bytes| comparison.compare(start_bytes + offset, bytes)),
        &progress,
    )?;
    let (difference, remark) = comparison.finish(range.len_bytes)?;
    progress.finish("compared", transfer);
    for line in [difference.as_ref().map(ToString::to_string), remark].into_iter().flatten() {
        eprintln!("ringpass-dd: {line}");
    }
    Ok(difference.is_none())
}

fn options(arguments: &Arguments) -> Options {
    let entries = u32::from(arguments.depth).next_power_of_two().max(16);
    let buffers_bytes = u64::from(arguments.queues) * u64::from(arguments.depth) * arguments.block_bytes_wanted();
    Options::default()
        // In addition to the buffers: virtqueues and rings.
        .memory_bytes(buffers_bytes + u64::from(arguments.queues) * (1 << 20) + (4 << 20))
        .queues(arguments.queues)
        .ring(RingSize { sq_entries: entries, cq_entries: entries })
        .way(arguments.way.into())
        .patience(Duration::from_secs(arguments.patience_s))
}
