//! The device's side of a split virtqueue (VIRTIO 1.2, 2.7), without indirect descriptors.

use std::{
    fs::File,
    io::{self, Write},
    sync::{Arc, Mutex},
};

use super::{Shared, locked};

const DESC_BYTES: u64 = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;

/// Where the front-end has put a queue.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    pub(super) size: u16,
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

/// A request: its pieces as addresses and lengths.
#[derive(Debug)]
pub(super) struct Chain {
    head: u16,
    readable: Vec<(u64, usize)>,
    writable: Vec<(u64, usize)>,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) shared: Arc<Shared>,
    place: Place,
    next_avail: u16,
    next_used: u16,
    call: Arc<Mutex<Option<File>>>,
}

impl Queue {
    pub(super) fn new(
        shared: Arc<Shared>,
        place: Place,
        base: u16,
        call: Arc<Mutex<Option<File>>>,
    ) -> io::Result<Self> {
        let next_used = shared.ram.read_u16(place.used + 2)?;
        Ok(Self { shared, place, next_avail: base, next_used, call })
    }

    /// The index of the next request.
    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    pub(super) fn pop(&mut self) -> io::Result<Option<Chain>> {
        let ram = &self.shared.ram;
        if ram.read_u16(self.place.avail + 2)? == self.next_avail {
            return Ok(None);
        }
        let entry = u64::from(self.next_avail % self.place.size);
        let head = ram.read_u16(self.place.avail + 4 + 2 * entry)?;
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let mut at = head;
        for _ in 0..self.place.size {
            let descriptor: [u8; 16] = ram.read(self.place.desc + DESC_BYTES * u64::from(at % self.place.size))?;
            let number = |from: usize, bytes: usize| {
                descriptor[from..from + bytes].iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
            };
            let flags = number(12, 2) as u16;
            let piece = (number(0, 8), number(8, 4) as usize);
            if flags & DESC_F_WRITE == 0 { &mut chain.readable } else { &mut chain.writable }.push(piece);
            if flags & DESC_F_NEXT == 0 {
                break;
            }
            at = number(14, 2) as u16;
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(chain))
    }

    /// What the driver sends: the header and the payload.
    pub(super) fn payload(&self, chain: &Chain) -> io::Result<Vec<u8>> {
        let mut payload = Vec::new();
        for (gpa, bytes) in &chain.readable {
            let start = payload.len();
            payload.resize(start + bytes, 0);
            self.shared.ram.read_into(*gpa, &mut payload[start..])?;
        }
        Ok(payload)
    }

    /// Completes a request, and signals the driver.
    pub(super) fn complete(&mut self, chain: &Chain, answer: &[u8], status: u8) -> io::Result<()> {
        let ram = &self.shared.ram;
        let room = chain.answer_bytes();
        let whole: Vec<u8> = answer.iter().copied().chain(std::iter::repeat(0)).take(room).chain([status]).collect();
        let mut rest = whole.as_slice();
        for (gpa, bytes) in &chain.writable {
            let (now, later) = rest.split_at(*bytes);
            ram.write(*gpa, now)?;
            rest = later;
        }
        let entry = self.place.used + 4 + 8 * u64::from(self.next_used % self.place.size);
        ram.write(entry, &u32::from(chain.head).to_le_bytes())?;
        ram.write(entry + 4, &(whole.len() as u32).to_le_bytes())?;
        self.next_used = self.next_used.wrapping_add(1);
        ram.write(self.place.used + 2, &self.next_used.to_le_bytes())?;
        self.signal()
    }

    pub(super) fn signal(&self) -> io::Result<()> {
        locked(&self.call).as_mut().map_or(Ok(()), |call| call.write_all(&1_u64.to_ne_bytes()))
    }
}

impl Chain {
    /// The room for the answer, without the status.
    pub(super) fn answer_bytes(&self) -> usize {
        self.writable.iter().map(|(_, bytes)| bytes).sum::<usize>().saturating_sub(1)
    }
}
