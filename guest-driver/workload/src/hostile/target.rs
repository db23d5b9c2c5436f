//! The guest that the script is for, and the addresses that it may reach.

use core::fmt;

use ringpass_guest_abi::FixedAddressing;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub gpa: u64,
    /// Length in bytes, not 0.
    pub len_bytes: u64,
}

impl Extent {
    pub(super) fn end(&self) -> u64 {
        self.gpa.saturating_add(self.len_bytes)
    }

    fn contains(&self, gpa: u64) -> bool {
        self.gpa <= gpa && gpa < self.end()
    }
}

/// The guest, its disk, and further addresses to try.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The guest's RAM.
    pub ram: &'a [Extent],
    /// Holes between RAM regions in one slot. The broker fills them with scratch memory of this guest.
    pub filled_holes: &'a [Extent],
    /// Some ranges where the guest has no memory.
    pub empty_holes: &'a [Extent],
    /// How this device addresses guest memory.
    pub addressing: FixedAddressing,
    /// Address of guest RAM that reads may overwrite, a multiple of 4096. The buffer must not cross a 4 MiB boundary.
    pub buffer_gpa: u64,
    /// Length of the buffer and of most requests: a multiple of 4096 and of the disk's logical block.
    pub buffer_bytes: u32,
    /// Size of the disk, at least `disk_offset_bytes` plus `buffer_bytes`.
    pub disk_bytes: u64,
    /// Position on the disk of all requests that do not try another position; a multiple of the disk's logical block.
    pub disk_offset_bytes: u64,
    /// Whether the disk is read-only.
    pub read_only: bool,
    /// Virtual addresses of the host to try: addresses of the ring's owner, or any others.
    pub host_addresses: &'a [u64],
    /// Also try transfers of zero bytes. Linux before 6.18.22 and 6.19.12 has a hole there (CVE-2026-43006).
    pub zero_length: bool,
}

/// The memory in a range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Memory that is not only the guest's: the request must be refused.
    Nothing,
    /// Only scratch memory of the guest.
    Scratch,
    /// The guest's RAM, perhaps with scratch memory.
    Ram,
}

/// The reason why there is no script for a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetError {
    /// A range has no bytes, or does not end inside the 64-bit address space.
    Extent(Extent),
    /// The buffer is not a multiple of 4096 bytes of the guest's RAM, or a 4 MiB boundary cuts it.
    Buffer {
        /// [`Target::buffer_gpa`].
        gpa: u64,
        /// [`Target::buffer_bytes`].
        len_bytes: u32,
    },
    /// The position is not on the disk.
    DiskOffset {
        /// [`Target::disk_offset_bytes`].
        offset_bytes: u64,
        /// [`Target::disk_bytes`].
        disk_bytes: u64,
    },
}

impl Target<'_> {
    pub(super) fn check(&self) -> Result<(), TargetError> {
        let bad = |extent: &&Extent| extent.len_bytes == 0 || extent.gpa.checked_add(extent.len_bytes).is_none();
        if let Some(extent) = [self.ram, self.filled_holes, self.empty_holes].into_iter().flatten().find(bad) {
            return Err(TargetError::Extent(*extent));
        }
        let (gpa, len_bytes) = (self.buffer_gpa, self.buffer_bytes);
        let in_pages = len_bytes != 0 && len_bytes % 4096 == 0 && gpa % 4096 == 0;
        let own = self.addressing.resolve(gpa, len_bytes);
        let is_ram = own.is_ok_and(|own| self.reach(own.buf_index, own.addr, len_bytes) == Reach::Ram);
        if !in_pages || !is_ram {
            return Err(TargetError::Buffer { gpa, len_bytes });
        }
        let (offset_bytes, disk_bytes) = (self.disk_offset_bytes, self.disk_bytes);
        match offset_bytes.checked_add(u64::from(len_bytes)) {
            Some(end) if end <= disk_bytes => Ok(()),
            _ => Err(TargetError::DiskOffset { offset_bytes, disk_bytes }),
        }
    }

    /// Classifies the `len_bytes` bytes at `addr` of fixed buffer `buf_index`.
    pub fn reach(&self, buf_index: u16, addr: u64, len_bytes: u32) -> Reach {
        let Some(first) = addr.checked_sub(self.addressing.iova_base()) else {
            return Reach::Nothing;
        };
        let Some(end) = first.checked_add(u64::from(len_bytes)) else {
            return Reach::Nothing;
        };
        let last = end.saturating_sub(1).max(first);
        let slot = |gpa: u64| gpa >> self.addressing.slot_shift();
        if slot(first) != u64::from(buf_index) || slot(last) != u64::from(buf_index) {
            return Reach::Nothing;
        }
        let mut reach = Reach::Scratch;
        let mut next = first;
        while next <= last {
            let at = |extents: &[Extent]| extents.iter().find(|extent| extent.contains(next)).map(Extent::end);
            next = match (at(self.ram), at(self.filled_holes)) {
                (Some(end), _) => {
                    reach = Reach::Ram;
                    end
                }
                (None, Some(end)) => end,
                (None, None) => return Reach::Nothing,
            };
        }
        reach
    }
}

impl fmt::Display for TargetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Extent(Extent { gpa, len_bytes }) => {
                write!(f, "the range of {len_bytes} bytes at guest-physical {gpa:#x} is empty or wraps around")
            }
            Self::Buffer { gpa, len_bytes } => write!(
                f,
                "the buffer of {len_bytes} bytes at guest-physical {gpa:#x} must be whole 4 KiB pages of RAM without a 4 MiB \
                 boundary inside"
            ),
            Self::DiskOffset { offset_bytes, disk_bytes } => {
                write!(f, "a request at {offset_bytes} of the disk would not end inside its {disk_bytes} bytes")
            }
        }
    }
}

impl core::error::Error for TargetError {}
