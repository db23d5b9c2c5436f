//! The block of a vCPU: the memory for the communication with the monitor and with the vCPU's own interrupt handlers.

use core::fmt;

use ringpass_bare_metal::{Answer, BUCKETS, Histogram, MAILBOX_WORDS, MESSAGE_BYTES, Words, map::block};

use crate::cpu;

/// A handle to a vCPU's block.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    base: *mut u8,
}

impl Block {
    /// The block at `address`.
    ///
    /// # Safety
    ///
    /// The address is that of this vCPU's block, which stays mapped for ever.
    pub(crate) unsafe fn at(address: u64) -> Self {
        Self { base: address as *mut u8 }
    }

    /// The block of the vCPU that runs this code.
    pub(crate) fn of_this_cpu() -> Self {
        Self { base: cpu::own_block() as *mut u8 }
    }

    /// The host's command, copied once.
    pub(crate) fn command(&self) -> Words {
        core::array::from_fn(|index| self.read(block::COMMAND + index * 8))
    }

    /// Writes an answer. The host reads it when the vCPU calls.
    pub(crate) fn answer(&self, answer: &Answer) {
        for (index, word) in answer.to_words().into_iter().enumerate() {
            self.write(block::ANSWER + index * 8, word);
        }
    }

    /// The text of the next answer, empty at first.
    pub(crate) fn message(&self) -> Message<'_> {
        for offset in 0..MESSAGE_BYTES {
            self.write(block::MESSAGE + offset, 0u8);
        }
        Message { block: self, used: 0 }
    }

    /// Takes and clears the flag of the queue's interrupt.
    pub(crate) fn take_interrupt(&self) -> bool {
        // An interrupt between the two accesses is not lost: the caller looks for completions afterwards.
        let interrupted = self.read::<u8>(block::INTERRUPTED) != 0;
        if interrupted {
            self.write(block::INTERRUPTED, 0u8);
        }
        interrupted
    }

    pub(crate) fn clear_histogram(&self) {
        for bucket in 0..BUCKETS {
            self.write(block::HISTOGRAM + bucket * 8, 0u64);
        }
    }

    pub(crate) fn count_latency(&self, latency_ns: u64) {
        let offset = block::HISTOGRAM + Histogram::bucket(latency_ns) * 8;
        self.write(offset, self.read::<u64>(offset) + 1);
    }

    fn read<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: inside the block, whose parts are aligned to 8 bytes.
        let from = unsafe { self.base.add(offset) }.cast::<T>();
        // SAFETY: mapped, by the contract of `at`; integers only; volatile, since handlers and the host write it.
        unsafe { from.read_volatile() }
    }

    fn write<T: Copy>(&self, offset: usize, value: T) {
        // SAFETY: inside the block, whose parts are aligned to 8 bytes.
        let to = unsafe { self.base.add(offset) }.cast::<T>();
        // SAFETY: mapped, by the contract of `at`; volatile, since handlers and the host read it.
        unsafe { to.write_volatile(value) }
    }
}

const _: () = assert!(block::COMMAND + MAILBOX_WORDS * 8 <= block::ANSWER);
const _: () = assert!(block::ANSWER + MAILBOX_WORDS * 8 <= block::MESSAGE);
const _: () = assert!(block::MESSAGE + MESSAGE_BYTES <= block::TASK_STATE);
const _: () = assert!(block::HISTOGRAM + BUCKETS * 8 + ringpass_workload::STACK_BYTES * 2 <= block::STACK_TOP);

/// Text in the block.
pub(crate) struct Message<'a> {
    block: &'a Block,
    used: usize,
}

impl fmt::Write for Message<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.used == MESSAGE_BYTES {
                return Err(fmt::Error);
            }
            self.block.write(block::MESSAGE + self.used, byte);
            self.used += 1;
        }
        Ok(())
    }
}
