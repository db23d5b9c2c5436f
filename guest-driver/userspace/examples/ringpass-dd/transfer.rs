//! Keeps queues busy, and processes their completions in order.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ringpass_guest::RamArea;
use ringpass_guest::vhost_user::{Disk, Done, ExecutedBy, Geometry, Operation, Queue};

use crate::args::{Arguments, Command, WaitArg};
use crate::ends::{Input, is_zero};
use crate::interrupt;
use crate::progress::Progress;

/// Maximum time to sleep before the next check for Ctrl-C.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// The program does not report a shorter pause of the server.
const REPORT_AFTER: Duration = Duration::from_secs(2);

/// A range of the disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    /// The start.
    pub(crate) offset_bytes: u64,
    /// The length. `None`: the length of the input, known at its end.
    pub(crate) len_bytes: Option<u64>,
}

impl Range {
    /// The range of the command line, checked against the disk.
    ///
    /// # Errors
    ///
    /// The range is not on the disk or not in whole blocks, or the disk is read-only.
    pub(crate) fn checked(arguments: &Arguments, disk: &Geometry, input: Option<&Input>) -> Result<Self> {
        let Arguments { offset_bytes, length_bytes, .. } = *arguments;
        let block_bytes = u64::from(disk.logical_block_bytes);
        ensure!(
            !(disk.is_read_only && matches!(arguments.command, Command::Write { .. })),
            "the disk is read-only: serve it without --read-only to write to it"
        );
        let left_bytes = disk.size_bytes.checked_sub(offset_bytes).filter(|&left_bytes| left_bytes > 0);
        let left_bytes = left_bytes.with_context(|| {
            format!(
                "--offset-bytes {offset_bytes} is not before the end of the disk, which has {} bytes",
                disk.size_bytes
            )
        })?;
        let (len_bytes, what) = match (length_bytes, input.map(|input| (input.len_bytes(), input.name()))) {
            (Some(asked_bytes), Some((Some(has_bytes), name))) if has_bytes < asked_bytes => {
                bail!("{name} has {has_bytes} bytes, fewer than --length-bytes {asked_bytes}")
            }
            (Some(asked_bytes), _) => (Some(asked_bytes), "--length-bytes"),
            (None, None) => (Some(left_bytes), "the rest of the disk"),
            // A pipe: compare it with the rest of the disk.
            (None, Some((None, name))) if matches!(arguments.command, Command::Verify { .. }) => {
                (Some(left_bytes), name)
            }
            (None, Some((has_bytes, name))) => (has_bytes, name),
        };
        for (what, bytes) in [("--offset-bytes", offset_bytes), (what, len_bytes.unwrap_or(0))] {
            ensure!(
                bytes.checked_rem(block_bytes) == Some(0),
                "{what}: {bytes} bytes are no multiple of {block_bytes}, the block size of the disk"
            );
        }
        if let Some(bytes) = len_bytes.filter(|&bytes| bytes > left_bytes) {
            bail!(
                "{what}: {bytes} bytes do not fit: the disk has {} bytes, of which {left_bytes} follow --offset-bytes",
                disk.size_bytes
            );
        }
        match (length_bytes, input.map(Input::name), len_bytes) {
            (None, Some(name), Some(bytes)) if bytes < left_bytes => {
                report_rest(&arguments.command, name, bytes, left_bytes);
            }
            _ => {}
        }
        Ok(Self { offset_bytes, len_bytes })
    }
}

/// Reports that an input is shorter than the disk.
pub(crate) fn report_rest(command: &Command, name: &str, bytes: u64, disk_bytes: u64) {
    let what = if matches!(command, Command::Write { .. }) { "stay unchanged" } else { "are not compared" };
    eprintln!("ringpass-dd: {name} has {bytes} bytes: the {} bytes of the disk after them {what}", disk_bytes - bytes);
}

/// The direction of a copy. Offsets are relative to the range.
pub(crate) enum Direction<'d> {
    /// The function gets each block in order.
    FromDisk(&'d mut dyn FnMut(u64, &[u8]) -> Result<()>),
    /// The function fills each block in order, the last block perhaps in part.
    ToDisk {
        /// Returns the number of bytes filled.
        fill: &'d mut dyn FnMut(&mut [u8]) -> Result<usize>,
        /// The disk to ask for zeroes, instead of writing them.
        zeroes: Option<&'d Disk>,
    },
}

/// Queues of a disk, with buffers. Both return to the disk when this is dropped: the disk can be used for other
/// transfers then.
pub(crate) struct Transfer<'d> {
    disk: &'d Disk,
    queues: Vec<Queue>,
    buffers: Vec<RamArea>,
    block_bytes: u64,
    depth: usize,
    wait: WaitArg,
    patience: Duration,
    moved_bytes: u64,
    is_input_longer: bool,
}

/// A copy that is under way.
#[derive(Default)]
struct Course {
    /// The next block to begin, and the next block to finish.
    next: u64,
    oldest: u64,
    /// Total length of the blocks that were begun.
    begun_bytes: u64,
    is_all_begun: bool,
    /// Blocks that ended before earlier blocks.
    early: BTreeMap<u64, (RamArea, u32)>,
    /// Lengths of the blocks that were begun and are not finished, the oldest first.
    lengths: VecDeque<u32>,
}

impl<'d> Transfer<'d> {
    /// Takes queues and allocates buffers.
    ///
    /// # Errors
    ///
    /// The disk has only its first queue, or the options demand rings and the disk offers none.
    pub(crate) fn new(disk: &'d Disk, arguments: &Arguments, block_bytes: u64) -> Result<Self> {
        let count = disk.queue_count().saturating_sub(1).min(arguments.queues);
        ensure!(
            count > 0,
            "the disk has only queue 0, which the driver uses itself: serve it with --num-queues 2 or more"
        );
        let queues = (1..=count).map(|index| disk.queue(index)).collect::<Result<Vec<_>, _>>()?;
        let depth = usize::from(arguments.depth);
        let buffers = (0..queues.len() * depth).map(|_| disk.allocate(arguments.block_bytes_wanted()));
        let buffers = buffers.collect::<Result<_, _>>()?;
        let patience = Duration::from_secs(arguments.patience_s);
        Ok(Self {
            disk,
            queues,
            buffers,
            block_bytes,
            depth,
            wait: arguments.wait,
            patience,
            moved_bytes: 0,
            is_input_longer: false,
        })
    }

    /// The number of bytes that the last run moved.
    pub(crate) fn moved_bytes(&self) -> u64 {
        self.moved_bytes
    }

    /// Whether the input continues after the end of the disk.
    pub(crate) fn is_input_longer(&self) -> bool {
        self.is_input_longer
    }

    /// A summary of the copy for the last line.
    pub(crate) fn summary(&self) -> String {
        let ways = self.queues.iter().map(|queue| match queue.executed_by() {
            ExecutedBy::Ring { epoch } => format!("a ring (epoch {epoch})"),
            ExecutedBy::Virtqueue { refused: Some(why) } => format!("a virtqueue ({why:?})"),
            ExecutedBy::Virtqueue { refused: None } => "a virtqueue".into(),
            ExecutedBy::BetweenRings => "between rings".into(),
            other => format!("{other:?}"),
        });
        let ways: Vec<String> = ways.zip(1..).map(|(way, index)| format!("queue {index} is {way}")).collect();
        let again: u64 = self.queues.iter().map(|queue| queue.counters().resubmitted).sum();
        format!("{}; requests sent again: {again}, server lost: {} times", ways.join(", "), self.disk.reconnects())
    }

    /// Copies.
    ///
    /// # Errors
    ///
    /// The disk or the other end fails, the server does not answer for too long, or a signal asks the program to end.
    pub(crate) fn run(&mut self, range: Range, mut direction: Direction<'_>, progress: &Progress) -> Result<()> {
        let mut course = Course::default();
        self.moved_bytes = 0;
        // Only waits for the server count, not waits for a pipe.
        let mut silence = Duration::ZERO;
        let mut has_reported = false;
        loop {
            while !course.is_all_begun && self.begin(&mut course, range, &mut direction)? {}
            if course.is_all_begun && course.oldest == course.next {
                return Ok(());
            }
            interrupt::note_moved(self.moved_bytes);
            interrupt::check()?;
            progress.note_losses(self.disk.reconnects());
            let (before, begin) = (self.moved_bytes, Instant::now());
            self.finish(&mut course, range, &mut direction)?;
            if self.moved_bytes > before {
                progress.moved(self.moved_bytes - before);
                silence = Duration::ZERO;
                has_reported = false;
            } else {
                silence += begin.elapsed();
            }
            if silence > REPORT_AFTER && !std::mem::replace(&mut has_reported, true) {
                progress.report(&format!("the server does not answer; waiting up to {} s", self.patience.as_secs()));
            }
            ensure!(
                silence < self.patience,
                "no answer from the server for {} s: check that `ringpass serve` is running and that its disk is free",
                self.patience.as_secs()
            );
        }
    }

    /// Begins the next block. Returns false if there is no room for it now.
    fn begin(&mut self, course: &mut Course, range: Range, direction: &mut Direction<'_>) -> Result<bool> {
        let left_bytes = range.len_bytes.map_or(self.block_bytes, |len_bytes| len_bytes - course.begun_bytes);
        let mut len_bytes = left_bytes.min(self.block_bytes);
        if len_bytes == 0 {
            course.is_all_begun = true;
            return Ok(false);
        }
        let queue = queue_of(course.next, &mut self.queues);
        if queue.outstanding() >= self.depth {
            return Ok(false);
        }
        let Some(mut buffer) = self.buffers.pop() else { return Ok(false) };
        let offset_bytes = range.offset_bytes + course.begun_bytes;
        let mut operation = Operation::Read;
        if let Direction::ToDisk { fill, zeroes } = direction {
            operation = Operation::Write;
            let bytes = buffer.bytes_mut(0, len_bytes).context("a buffer is as long as a block")?;
            let filled_bytes = fill(bytes)? as u64;
            if filled_bytes < len_bytes {
                self.check_end(range, offset_bytes, filled_bytes)?;
                course.is_all_begun = true;
                len_bytes = filled_bytes;
            }
            let room_bytes = self.disk.geometry().size_bytes.saturating_sub(offset_bytes);
            if len_bytes > room_bytes {
                // The program writes the part that fits, and fails afterwards.
                self.is_input_longer = true;
                course.is_all_begun = true;
                len_bytes = room_bytes;
            }
            let is_made = |disk: &&Disk| disk.geometry().write_zeroes_bytes_max > 0;
            let bytes = &bytes[..usize::try_from(len_bytes)?];
            if let Some(disk) = zeroes.filter(is_made).filter(|_| !bytes.is_empty() && is_zero(bytes)) {
                disk.write_zeroes(offset_bytes, len_bytes, true)?;
                course.early.insert(course.next, (buffer, len_bytes as u32));
                course.take(len_bytes);
                return Ok(true);
            }
            if len_bytes == 0 {
                self.buffers.push(buffer);
                return Ok(false);
            }
        }
        let queue = queue_of(course.next, &mut self.queues);
        if let Err(buffer) = queue.submit(operation, buffer, offset_bytes, len_bytes as u32, course.next) {
            ensure!(
                matches!(direction, Direction::FromDisk(_)),
                "a queue has room for fewer requests than --depth: lower --depth"
            );
            self.buffers.push(buffer);
            return Ok(false);
        }
        if range.len_bytes.is_none() {
            // Send at once: the next bytes of a pipe may take long to arrive.
            queue.send();
        }
        course.take(len_bytes);
        Ok(true)
    }

    /// Checks an input that ended within a block.
    fn check_end(&self, range: Range, offset_bytes: u64, filled_bytes: u64) -> Result<()> {
        let total_bytes = offset_bytes - range.offset_bytes + filled_bytes;
        if let Some(len_bytes) = range.len_bytes {
            bail!("the input ended after {total_bytes} of {len_bytes} bytes");
        }
        let block_bytes = u64::from(self.disk.geometry().logical_block_bytes);
        ensure!(
            filled_bytes.checked_rem(block_bytes) == Some(0),
            "the input ended after {total_bytes} bytes, which is no multiple of {block_bytes}, the block size of the disk: its \
             last bytes are not written"
        );
        Ok(())
    }

    /// Waits for requests to end, takes the ended ones, and passes on the blocks that are next in order.
    fn finish(&mut self, course: &mut Course, range: Range, direction: &mut Direction<'_>) -> Result<()> {
        // Nothing can be passed on before the oldest block has ended.
        let is_due = course.early.contains_key(&course.oldest);
        if !is_due && self.wait == WaitArg::Interrupt {
            let done = queue_of(course.oldest, &mut self.queues).wait(CHECK_INTERVAL);
            done.into_iter().try_for_each(|done| note(done, course, range, self.block_bytes))?;
        }
        let mut is_idle = !is_due;
        for queue in &mut self.queues {
            queue.send();
            while let Some(done) = queue.poll() {
                is_idle = false;
                note(done, course, range, self.block_bytes)?;
            }
            if let Some(fault) = queue.fault() {
                bail!("{fault}");
            }
        }
        if is_idle && self.wait == WaitArg::Poll {
            std::thread::yield_now();
        }
        while let Some((mut buffer, len_bytes)) = course.early.remove(&course.oldest) {
            if let Direction::FromDisk(put) = direction {
                let bytes = buffer.bytes_mut(0, len_bytes.into()).context("a buffer is as long as a block")?;
                put(course.oldest * self.block_bytes, bytes)?;
            }
            self.buffers.push(buffer);
            self.moved_bytes += u64::from(len_bytes);
            course.oldest += 1;
            course.lengths.pop_front();
        }
        Ok(())
    }
}

/// The queue of a block: blocks are distributed round-robin.
fn queue_of(block: u64, queues: &mut [Queue]) -> &mut Queue {
    let at = usize::try_from(block).unwrap_or(usize::MAX) % queues.len();
    &mut queues[at]
}

impl Course {
    fn take(&mut self, len_bytes: u64) {
        self.next += 1;
        self.begun_bytes += len_bytes;
        self.lengths.push_back(len_bytes as u32);
    }
}

/// Records a request that has ended, perhaps before earlier requests.
fn note(done: Done, course: &mut Course, range: Range, block_bytes: u64) -> Result<()> {
    let Done { tag, result, buffer, .. } = done;
    let place = range.offset_bytes + tag * block_bytes;
    let moved_bytes = result.with_context(|| format!("I/O error of the disk at byte {place}"))?;
    let wanted_bytes = usize::try_from(tag - course.oldest).ok().and_then(|index| course.lengths.get(index));
    ensure!(
        wanted_bytes == Some(&moved_bytes),
        "the disk transferred {moved_bytes} of {wanted_bytes:?} bytes at byte {place}"
    );
    course.early.insert(tag, (buffer, moved_bytes));
    Ok(())
}
