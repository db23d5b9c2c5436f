//! The request slots of a run, each with its own buffer.

use crate::DEPTH_MAX;
use crate::content::UNKNOWN;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Free,
    /// Chosen and its buffer made ready, but the queue has not taken it yet.
    Prepared,
    InFlight,
    /// In flight for longer than the job allows.
    Lost,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) user_data: u64,
    /// When the request was shown to the device; before that, when it was prepared.
    pub(crate) since_ns: u64,
    /// What the block will hold when a write has succeeded.
    pub(crate) written: u64,
    pub(crate) block: u32,
    pub(crate) write: bool,
    pub(crate) durable: bool,
    pub(crate) state: State,
}

impl Slot {
    pub(crate) const FREE: Self = Self {
        user_data: 0,
        since_ns: 0,
        written: UNKNOWN,
        block: 0,
        write: false,
        durable: false,
        state: State::Free,
    };
}

pub(crate) struct Slots {
    all: [Slot; DEPTH_MAX as usize],
    depth: usize,
    /// A stack of the slots that are not in flight: the last one used comes first, while its buffer is in cache.
    free: [u16; DEPTH_MAX as usize],
    free_count: usize,
    pushed: [u16; DEPTH_MAX as usize],
    pushed_count: usize,
}

impl Slots {
    /// `depth` free slots; at most [`DEPTH_MAX`].
    pub(crate) fn new(depth: u32) -> Self {
        let depth = depth.min(DEPTH_MAX) as usize;
        let mut free = [0; DEPTH_MAX as usize];
        for (entry, index) in free.iter_mut().zip((0..depth as u16).rev()) {
            *entry = index;
        }
        Self {
            all: [Slot::FREE; DEPTH_MAX as usize],
            depth,
            free,
            free_count: depth,
            pushed: [0; DEPTH_MAX as usize],
            pushed_count: 0,
        }
    }

    /// Takes a free slot.
    pub(crate) fn take(&mut self) -> Option<u16> {
        let count = self.free_count.checked_sub(1)?;
        self.free_count = count;
        Some(self.free[count])
    }

    /// The queue has taken the request of this slot; the device has not been shown it yet.
    pub(crate) fn note_pushed(&mut self, index: u16) {
        self.pushed[self.pushed_count] = index;
        self.pushed_count += 1;
    }

    pub(crate) fn has_pushed(&self) -> bool {
        self.pushed_count != 0
    }

    /// All pushed slots are in flight from now on. Returns how many.
    pub(crate) fn start_pushed(&mut self, now_ns: u64) -> u32 {
        let count = core::mem::take(&mut self.pushed_count);
        for &index in &self.pushed[..count] {
            let slot = &mut self.all[usize::from(index)];
            slot.since_ns = now_ns;
            slot.state = State::InFlight;
        }
        count as u32
    }

    /// Gives a slot back.
    pub(crate) fn release(&mut self, index: u16) {
        self.all[usize::from(index)].state = State::Free;
        self.free[self.free_count] = index;
        self.free_count += 1;
    }

    pub(crate) fn get(&self, index: u16) -> &Slot {
        &self.all[usize::from(index)]
    }

    pub(crate) fn get_mut(&mut self, index: u16) -> &mut Slot {
        &mut self.all[usize::from(index)]
    }

    /// The slot that `user_data` names, if there is such a number.
    pub(crate) fn find(&self, index: u64) -> Option<(u16, Slot)> {
        let slot = self.all[..self.depth].get(usize::try_from(index).ok()?)?;
        Some((u16::try_from(index).ok()?, *slot))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.all[..self.depth].iter()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.all[..self.depth].iter_mut()
    }
}
