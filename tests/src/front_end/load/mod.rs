//! I/O with many requests at once. The load verifies every byte.
//!
//! A load finds requests that are lost, executed twice, torn or completed twice, while the test does anything to the
//! back-end: each write has its own content, and a block belongs to one request at a time.

mod model;
mod options;
mod request;
mod running;
mod written;

use std::{fs::File, sync::Arc, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress};

use self::request::{CONTROL_BYTES, MAX_SEGMENTS, Operation, Request, Slot, segments};
pub use self::{
    model::{BLOCK_BYTES, Model},
    options::LoadOptions,
    running::RunningLoad,
    written::{Period, WrittenPages},
};
use super::{
    blk::{HEADER_BYTES, NO_STATUS, SECTOR_BYTES, header, range},
    descriptor::Descriptor,
    ram::Arena,
    vring::DriverVring,
};

/// Room behind a buffer, for buffers that begin at an odd address.
const SLACK_BYTES: u64 = 512;

/// A driver under load.
#[derive(Debug)]
pub struct Load {
    vring: DriverVring,
    options: LoadOptions,
    model: Model,
    slots: Vec<Slot>,
    rng: fastrand::Rng,
    outstanding: usize,
    completed: u64,
    written: Arc<WrittenPages>,
}

impl Load {
    /// A load on a vring. It takes its buffers from the arenas in turn.
    ///
    /// # Errors
    ///
    /// The arenas do not have enough memory left.
    pub fn new(vring: DriverVring, arenas: &mut [Arena], options: LoadOptions) -> Result<Self> {
        ensure!(!arenas.is_empty() && options.depth > 0 && options.max_blocks > 0);
        let count = arenas.len();
        let slots = (0..options.depth)
            .map(|index| {
                let arena = &mut arenas[index % count];
                let data_bytes = options.max_blocks as u64 * BLOCK_BYTES + SLACK_BYTES;
                let data_gpa = arena.take(data_bytes, 4096)?;
                Ok(Slot { control_gpa: arena.take(CONTROL_BYTES, 16)?, data_gpa, request: None })
            })
            .collect::<Result<_>>()?;
        let model = Model::zeroes(options.first_block, options.blocks, options.seed);
        let rng = options.seed.derive("choices").rng();
        Ok(Self { vring, options, model, slots, rng, outstanding: 0, completed: 0, written: Arc::default() })
    }

    /// The vring.
    pub fn vring(&mut self) -> &mut DriverVring {
        &mut self.vring
    }

    /// What the disk must hold.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The pages that the device wrote for this load, while the load notes them.
    pub fn written(&self) -> &Arc<WrittenPages> {
        &self.written
    }

    /// Completed requests.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Does this many more requests, and waits for all of them.
    ///
    /// # Errors
    ///
    /// A request fails or has the wrong data, or nothing completes in time.
    pub fn run(&mut self, requests: u64) -> Result<()> {
        let end = self.completed + requests;
        self.run_while(|completed| completed < end)
    }

    /// Does requests for as long as `goes_on` returns true, and waits for all of them.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn run_while(&mut self, mut goes_on: impl FnMut(u64) -> bool) -> Result<()> {
        let mut last_progress = Instant::now();
        loop {
            let reaped = self.reap()?;
            if reaped > 0 {
                last_progress = Instant::now();
            }
            let goes_on = goes_on(self.completed);
            if goes_on {
                self.fill()?;
            }
            if self.outstanding == 0 {
                if goes_on {
                    continue;
                }
                return Ok(());
            }
            if reaped == 0 {
                self.wait(last_progress)?;
            }
        }
    }

    fn wait(&mut self, last_progress: Instant) -> Result<()> {
        let left = self.options.patience.saturating_sub(last_progress.elapsed());
        let waited = if self.options.spin { self.vring.spin_for_used(left) } else { self.vring.wait_for_call(left) };
        waited.with_context(|| format!("{} requests are outstanding, {} completed", self.outstanding, self.completed))
    }

    /// Submits until the depth is reached or nothing fits.
    fn fill(&mut self) -> Result<()> {
        let mut added = false;
        for index in 0..self.slots.len() {
            if self.slots[index].request.is_none() && self.submit(index)? {
                added = true;
            }
        }
        if added {
            self.vring.publish()?;
        }
        Ok(())
    }

    /// Adds one request, unless the vring is full or another request has the blocks.
    fn submit(&mut self, index: usize) -> Result<bool> {
        if !self.vring.has_room(MAX_SEGMENTS + 2) {
            return Ok(false);
        }
        let Some((first, count)) = self.model.try_take(&mut self.rng, self.options.max_blocks) else {
            return Ok(false);
        };
        let odd_bytes = if self.options.unaligned && self.rng.bool() { self.rng.u64(1..SLACK_BYTES) } else { 0 };
        let data_gpa = self.slots[index].data_gpa + odd_bytes;
        let operation = self.choose();
        let period = self.written.period();
        let chain = self.chain(index, operation, first, count, data_gpa)?;
        let head = if self.options.indirect && self.rng.bool() {
            let table = self.vring.write_indirect_table(self.slots[index].table_gpa(), &chain)?;
            self.vring.add(&[table])?
        } else {
            self.vring.add(&chain)?
        };
        self.slots[index].request = Some(Request { head, operation, first, count, data_gpa, period });
        self.outstanding += 1;
        Ok(true)
    }

    fn choose(&mut self) -> Operation {
        let LoadOptions { write_percent, write_zeroes_percent, flush_percent, .. } = self.options;
        let choice = self.rng.u8(0..100);
        if choice < write_percent {
            Operation::Write { version: self.model.new_version() }
        } else if choice < write_percent + write_zeroes_percent {
            Operation::WriteZeroes
        } else if choice < write_percent + write_zeroes_percent + flush_percent {
            Operation::Flush
        } else {
            Operation::Read
        }
    }

    /// Writes a request into RAM, and returns its descriptors.
    fn chain(
        &mut self,
        index: usize,
        operation: Operation,
        first: usize,
        count: usize,
        data_gpa: u64,
    ) -> Result<Vec<Descriptor>> {
        let slot = &self.slots[index];
        let memory = self.vring.ram().memory();
        let sector = self.model.offset_bytes(first) / SECTOR_BYTES;
        let len_bytes = u32::try_from(count as u64 * BLOCK_BYTES)?;
        let (kind, sector) = match operation {
            Operation::Read => (VIRTIO_BLK_T_IN, sector),
            Operation::Write { .. } => (VIRTIO_BLK_T_OUT, sector),
            Operation::WriteZeroes => (VIRTIO_BLK_T_WRITE_ZEROES, 0),
            Operation::Flush => (VIRTIO_BLK_T_FLUSH, 0),
        };
        memory.write_slice(&header(kind, sector), GuestAddress(slot.control_gpa))?;
        memory.write_obj(NO_STATUS, GuestAddress(slot.status_gpa()))?;
        let mut chain = vec![Descriptor::readable(slot.control_gpa, HEADER_BYTES)];
        match operation {
            Operation::Read => {
                // Bytes that the read must overwrite.
                memory.write_slice(&vec![0xdd; len_bytes as usize], GuestAddress(data_gpa))?;
                chain.extend(segments(&mut self.rng, Descriptor::writable(data_gpa, len_bytes)));
            }
            Operation::Write { version } => {
                let mut content = vec![0; len_bytes as usize];
                self.model.content(first, version, &mut content);
                memory.write_slice(&content, GuestAddress(data_gpa))?;
                chain.extend(segments(&mut self.rng, Descriptor::readable(data_gpa, len_bytes)));
            }
            Operation::WriteZeroes => {
                let first_sector = self.model.offset_bytes(first) / SECTOR_BYTES;
                let flags = if self.rng.bool() { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
                let range = range(first_sector, len_bytes / SECTOR_BYTES as u32, flags);
                memory.write_slice(&range, GuestAddress(slot.ranges_gpa()))?;
                chain.push(Descriptor::readable(slot.ranges_gpa(), u32::try_from(range.len())?));
            }
            Operation::Flush => {}
        }
        chain.push(Descriptor::writable(slot.status_gpa(), 1));
        Ok(chain)
    }

    fn reap(&mut self) -> Result<usize> {
        let mut reaped = 0;
        while let Some(used) = self.vring.take_used()? {
            let ours = |slot: &Slot| slot.request.is_some_and(|request| request.head == used.head);
            let index = self.slots.iter().position(ours);
            let index = index.with_context(|| format!("chain {} was used, and is not outstanding", used.head))?;
            let request = self.slots[index].request.take().context("just found")?;
            self.outstanding -= 1;
            self.completed += 1;
            reaped += 1;
            self.check(index, request, used.len_bytes)
                .with_context(|| format!("request {} of the load: {request:x?}", self.completed))?;
        }
        self.written.set_next_used(self.vring.next_used());
        Ok(reaped)
    }

    fn check(&mut self, index: usize, request: Request, used_bytes: u32) -> Result<()> {
        let Request { operation, first, count, data_gpa, period, .. } = request;
        let memory = self.vring.ram().memory();
        let status: u8 = memory.read_obj(GuestAddress(self.slots[index].status_gpa()))?;
        if status != 0 {
            bail!("status {status:#x}");
        }
        let len_bytes = count * BLOCK_BYTES as usize;
        let mut written_bytes = 1;
        let mut written = None;
        match operation {
            Operation::Read => {
                let mut found = vec![0; len_bytes];
                memory.read_slice(&mut found, GuestAddress(data_gpa))?;
                self.model.check(first, &found)?;
                written_bytes += u32::try_from(len_bytes)?;
            }
            Operation::Write { version } => written = Some(version),
            Operation::WriteZeroes => written = Some(0),
            Operation::Flush => {}
        }
        ensure!(used_bytes == written_bytes, "the device says that it wrote {used_bytes} bytes, not {written_bytes}");
        self.model.give_back(first, count, written);
        if let Some(period) = period {
            self.written.note(period, self.slots[index].status_gpa(), 1);
            self.written.note(period, self.vring.last_used_gpa(), 8);
            if let Operation::Read = operation {
                self.written.note(period, data_gpa, len_bytes as u64);
            }
        }
        Ok(())
    }

    /// Compares all of the load's area with the file or device behind the disk. No request may be outstanding.
    ///
    /// # Errors
    ///
    /// The file or device has other content.
    pub fn check_disk(&self, file: &File) -> Result<()> {
        ensure!(self.outstanding == 0, "{} requests are outstanding", self.outstanding);
        self.model.check_file(file)
    }
}
