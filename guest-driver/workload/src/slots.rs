//! The request slots of a run, each with its own buffer.

use crate::DEPTH_MAX;
use crate::content::UNKNOWN;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Free,
    /// Chosen, with its buffer prepared, but not yet in the queue.
    Prepared,
    InFlight,
    /// In flight for longer than the job allows.
    Lost,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) user_data: u64,
    /// The time when the request was published to the device; before that, the time when it was prepared.
    pub(crate) since_ns: u64,
    /// The expected content of the block after a successful write.
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
    /// A stack of the slots that are not in flight. The last used slot comes first, while its buffer is in the cache.
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

    /// Records that the queue has taken the request of this slot, which is not yet published to the device.
    pub(crate) fn note_pushed(&mut self, index: u16) {
        self.pushed[self.pushed_count] = index;
        self.pushed_count += 1;
    }

    pub(crate) fn has_pushed(&self) -> bool {
        self.pushed_count != 0
    }

    /// Marks all pushed slots as in flight. Returns their number.
    pub(crate) fn start_pushed(&mut self, now_ns: u64) -> u32 {
        let count = core::mem::take(&mut self.pushed_count);
        for &index in &self.pushed[..count] {
            let slot = &mut self.all[usize::from(index)];
            slot.since_ns = now_ns;
            slot.state = State::InFlight;
        }
        count as u32
    }

    /// Returns a slot to the free slots.
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

    /// The slot of `user_data`, if that number exists.
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
