//! The device record: what the driver was told of the device. It lies behind the queues of an in-flight region.
//!
//! The front-end gives the region to the next process, which learns from the record what its guest relies on. The
//! vhost-user specification does not know this record. It lies behind the part that other back-ends look at, and only
//! in regions that ringpass made.
//!
//! ```text
//! 0    magic, then the version of this format (64 bits each)
//! 64   slot 0
//! 320  slot 1          each slot: sequence number, length in bytes, the record in words of 64 bits, checksum
//! ```
//!
//! A process writes a record to the slot that does not hold the newest whole record, and writes its checksum last. So a
//! process that dies in between leaves the previous record. Everything here is memory of the front-end: a loaded value
//! may be anything, and the code copies it before it checks it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::shared_memory::SharedMemory;

/// The longest record in bytes.
pub const DEVICE_RECORD_MAX_BYTES: usize = RECORD_WORDS * WORD_BYTES;
/// Size of the record area of a region, in bytes.
pub(super) const AREA_BYTES: usize = SLOTS_OFFSET + SLOTS * SLOT_BYTES;

const MAGIC: u64 = u64::from_le_bytes(*b"ringpass");
const VERSION: u64 = 1;
const WORD_BYTES: usize = size_of::<u64>();
const VERSION_OFFSET: usize = WORD_BYTES;
const SLOTS_OFFSET: usize = 64;
const SLOTS: usize = 2;
const SLOT_BYTES: usize = 256;
/// Words of a slot: sequence number, length, the record, checksum.
const SLOT_WORDS: usize = SLOT_BYTES / WORD_BYTES;
const RECORD_WORDS: usize = SLOT_WORDS - 3;

/// The record area of a mapped region.
#[derive(Clone, Debug)]
pub(super) struct DeviceRecordArea(SharedMemory);

/// A copied slot that holds a whole record.
#[derive(Debug, PartialEq, Eq)]
struct Whole {
    number: usize,
    sequence: u64,
    record: Vec<u8>,
}

impl DeviceRecordArea {
    /// Prepares a zeroed area for records.
    pub(super) fn prepare(area: &SharedMemory) {
        area.to_store::<AtomicU64>(VERSION_OFFSET).store(VERSION, Ordering::Release);
        area.to_store::<AtomicU64>(0).store(MAGIC, Ordering::Release);
    }

    /// The area, if a ringpass with the same format made it.
    pub(super) fn find(area: SharedMemory) -> Option<Self> {
        let word = |offset| area.atomic::<AtomicU64>(offset).load(Ordering::Acquire);
        (word(0) == MAGIC && word(VERSION_OFFSET) == VERSION).then_some(Self(area))
    }

    /// The newest whole record.
    pub(super) fn read(&self) -> Option<Vec<u8>> {
        self.newest().map(|whole| whole.record)
    }

    /// Writes a record of at most [`DEVICE_RECORD_MAX_BYTES`], unless the newest record is the same.
    pub(super) fn write(&self, record: &[u8]) {
        let newest = self.newest();
        if record.len() > DEVICE_RECORD_MAX_BYTES || newest.as_ref().is_some_and(|newest| newest.record == record) {
            return;
        }
        let (number, sequence) = newest.map_or((0, 1), |newest| (1 - newest.number, newest.sequence.wrapping_add(1)));
        let mut words = [0; SLOT_WORDS];
        words[0] = sequence;
        words[1] = record.len() as u64;
        for (word, bytes) in words[2..].iter_mut().zip(record.chunks(WORD_BYTES)) {
            let mut padded = [0; WORD_BYTES];
            padded[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(padded);
        }
        words[SLOT_WORDS - 1] = checksum(&words[..SLOT_WORDS - 1]);
        for (at, word) in words.into_iter().enumerate() {
            self.0.to_store::<AtomicU64>(offset(number, at)).store(word, Ordering::Release);
        }
    }

    fn newest(&self) -> Option<Whole> {
        let slots = (0..SLOTS).filter_map(|number| self.whole(number));
        // Sequence numbers wrap if a front-end forges them.
        slots.reduce(|one, other| if other.sequence.wrapping_sub(one.sequence) as i64 > 0 { other } else { one })
    }

    fn whole(&self, number: usize) -> Option<Whole> {
        let words: [u64; SLOT_WORDS] = std::array::from_fn(|at| {
            let word: &AtomicU64 = self.0.atomic(offset(number, at));
            word.load(Ordering::Acquire)
        });
        let [sequence, len_bytes, record @ .., sum] = &words;
        let len_bytes = usize::try_from(*len_bytes).ok().filter(|&len_bytes| len_bytes <= DEVICE_RECORD_MAX_BYTES)?;
        let mut record: Vec<u8> = record.iter().flat_map(|word| word.to_le_bytes()).collect();
        record.truncate(len_bytes);
        let is_whole = checksum(&words[..SLOT_WORDS - 1]) == *sum;
        is_whole.then_some(Whole { number, sequence: *sequence, record })
    }
}

fn offset(slot: usize, word: usize) -> usize {
    SLOTS_OFFSET + slot * SLOT_BYTES + word * WORD_BYTES
}

/// FNV-1a: distinguishes a completely written slot from a partial one. A front-end that forges it harms only itself.
fn checksum(words: &[u64]) -> u64 {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
