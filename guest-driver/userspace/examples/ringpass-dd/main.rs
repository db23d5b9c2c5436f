//! Copies to and from a disk that `ringpass serve` serves, over rings of the host's io_uring, without a virtual machine.
//!
//! ```console
//! $ ringpass-dd --socket /run/vm1.sock read  --output backup.img
//! $ ringpass-dd --socket /run/vm1.sock write --input backup.img --verify
//! $ ringpass-dd --socket /run/vm1.sock verify --input backup.img
//! ```
//!
//! It is also what a program on top of `ringpass_guest::vhost_user` looks like: `transfer.rs` keeps several queues busy with
//! buffers of the driver, and lives through servers that are restarted.

mod args;
mod ends;
mod interrupt;
mod progress;
mod transfer;

use std::process::ExitCode;

use anyhow::{Context, Error, Result};
use clap::Parser;
use ringpass_guest::vhost_user::{Disk, Options, RingSize};

use args::{Arguments, Command};
use ends::{Comparison, Input, Output};
use progress::Progress;
use transfer::{Direction, Range, Transfer};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ringpass-dd: {}", one_line(&error));
            // 1 says that contents differ.
            ExitCode::from(2)
        }
    }
}

/// The error and its causes, each once: the driver's messages say their causes themselves.
fn one_line(error: &Error) -> String {
    let causes = error.chain().map(ToString::to_string);
    let line = causes.reduce(|line, cause| if line.contains(&cause) { line } else { format!("{line}: {cause}") });
    line.unwrap_or_default()
}

/// False: the contents differ.
fn run(arguments: &Arguments) -> Result<bool> {
    interrupt::watch()?;
    let socket = arguments.socket()?;
    // Before anything is asked of the device: what cannot be done changes nothing.
    let mut input = arguments.command.input().map(Input::open).transpose()?;
    let disk = Disk::connect(socket, options(arguments))?;
    let block_bytes = arguments.block_bytes(disk.geometry().logical_block_bytes)?;
    let range = Range::checked(arguments, disk.geometry(), input.as_ref())?;
    let mut transfer = Transfer::new(&disk, arguments, block_bytes)?;
    match &arguments.command {
        Command::Read { output, sparse } => {
            let mut output = Output::create(output, *sparse)?;
            let progress = Progress::new(arguments, "reading", range.len_bytes);
            transfer.run(range, Direction::FromDisk(&mut |offset, bytes| output.put(offset, bytes)), &progress)?;
            output.finish(transfer.moved_bytes())?;
            progress.finish("read", &transfer);
        }
        Command::Write { verify, sparse, .. } => {
            let input = input.as_mut().context("clap demands an input")?;
            let progress = Progress::new(arguments, "writing", range.len_bytes);
            let mut fill = |bytes: &mut [u8]| input.fill(bytes);
            transfer.run(range, Direction::ToDisk { fill: &mut fill, zeroes: sparse.then_some(&disk) }, &progress)?;
            // Success says that it is stable.
            disk.flush().context("flushing")?;
            progress.finish("wrote", &transfer);
            if *verify {
                input.rewind()?;
                let written = Range { offset_bytes: range.offset_bytes, len_bytes: Some(transfer.moved_bytes()) };
                return compare(arguments, &mut transfer, written, input);
            }
        }
        Command::Verify { .. } => {
            let input = input.as_mut().context("clap demands an input")?;
            return compare(arguments, &mut transfer, range, input);
        }
    }
    Ok(true)
}

fn compare(arguments: &Arguments, transfer: &mut Transfer<'_>, range: Range, input: &mut Input) -> Result<bool> {
    let progress = Progress::new(arguments, "comparing", range.len_bytes);
    let mut comparison = Comparison::new(input);
    let start_bytes = range.offset_bytes;
    transfer.run(
        range,
        Direction::FromDisk(&mut |offset, bytes| comparison.look(start_bytes + offset, bytes)),
        &progress,
    )?;
    let difference = comparison.finish();
    progress.finish("compared", transfer);
    let Some(difference) = difference else { return Ok(true) };
    eprintln!("ringpass-dd: {difference}");
    Ok(false)
}

fn options(arguments: &Arguments) -> Options {
    let entries = u32::from(arguments.depth).next_power_of_two().max(16);
    let buffers_bytes = u64::from(arguments.queues) * u64::from(arguments.depth) * arguments.block_bytes_wanted();
    Options {
        // Beside the buffers: virtqueues, rings.
        memory_bytes: buffers_bytes + u64::from(arguments.queues) * (1 << 20) + (4 << 20),
        queues: arguments.queues,
        ring: RingSize { sq_entries: entries, cq_entries: entries },
        way: arguments.way.into(),
        ..Options::default()
    }
}
