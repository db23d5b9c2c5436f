//! A ring whose memory is guest RAM.

use ringpass_guest_abi::{Cqe, LayoutError, MappedRing, RingLayout, RingMemory, Sqe};

use crate::ram::{AllocateError, RamAllocator, RamArea, mapped_ring};

/// The two areas of one ring, in RAM that this value keeps mapped.
///
/// Call [`into_areas`](Self::into_areas) when the ring has ended, to use its areas again. After the drop of a
/// `RamRing`, the allocator does not hand out the bytes of the areas again, because the kernel may still write to them.
#[derive(Debug)]
pub struct RamRing {
    ring: MappedRing,
    rings: RamArea,
    sqes: RamArea,
}

/// The reason why areas cannot be used for a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The layout of the ring is invalid.
    #[error("the layout of the ring that the device describes is invalid: {0}")]
    Layout(LayoutError),
    /// The place of an area is not free RAM.
    #[error("the ring's {what} area cannot be at its place: {source}")]
    Place {
        /// `"rings"` or `"SQE"`.
        what: &'static str,
        /// The reason.
        source: AllocateError,
    },
    /// An area is shorter than the layout says.
    #[error("the ring's {what} area of {area_bytes} bytes is shorter than the {needed_bytes} bytes of its layout")]
    TooShort {
        /// `"rings"` or `"SQE"`.
        what: &'static str,
        /// Length of the area.
        area_bytes: u64,
        /// Length that the layout needs.
        needed_bytes: u64,
    },
}

impl RamRing {
    /// The ring with this layout in these areas.
    ///
    /// # Errors
    ///
    /// The layout is invalid, or an area is shorter than the layout says.
    pub fn new(mut rings: RamArea, mut sqes: RamArea, layout: &RingLayout) -> Result<Self, RingError> {
        layout.validate().map_err(RingError::Layout)?;
        let areas = [("rings", &rings, layout.rings_bytes), ("SQE", &sqes, layout.sqes_bytes)];
        for (what, area, needed_bytes) in areas {
            if area.len_bytes() < needed_bytes {
                return Err(RingError::TooShort { what, area_bytes: area.len_bytes(), needed_bytes });
            }
        }
        rings.lend();
        sqes.lend();
        let ring = mapped_ring(&rings, &sqes, layout).expect("both areas are as long as the layout says");
        Ok(Self { ring, rings, sqes })
    }

    /// The rings area.
    pub fn rings(&self) -> &RamArea {
        &self.rings
    }

    /// The SQE area.
    pub fn sqes(&self) -> &RamArea {
        &self.sqes
    }

    /// Returns the rings area and the SQE area, whose drop returns them to the allocator again. Call this only when the
    /// ring has ended: the device has confirmed the end, or has never made the ring.
    pub fn into_areas(mut self) -> (RamArea, RamArea) {
        self.rings.take_back();
        self.sqes.take_back();
        (self.rings, self.sqes)
    }
}

impl RamAllocator {
    /// The ring with this layout, whose areas the device has placed at these guest-physical addresses.
    ///
    /// # Errors
    ///
    /// The layout is invalid, or the place of an area is not free.
    pub fn ring(&mut self, rings_gpa: u64, layout: &RingLayout, sqes_gpa: u64) -> Result<RamRing, RingError> {
        layout.validate().map_err(RingError::Layout)?;
        let place = |what| move |source| RingError::Place { what, source };
        let rings = self.reserve(rings_gpa, layout.rings_bytes).map_err(place("rings"))?;
        let sqes = self.reserve(sqes_gpa, layout.sqes_bytes).map_err(place("SQE"))?;
        RamRing::new(rings, sqes, layout)
    }
}

impl RingMemory for RamRing {
    #[inline]
    fn load_relaxed(&self, offset_bytes: u32) -> u32 {
        self.ring.load_relaxed(offset_bytes)
    }

    #[inline]
    fn load_acquire(&self, offset_bytes: u32) -> u32 {
        self.ring.load_acquire(offset_bytes)
    }

    #[inline]
    fn store_relaxed(&self, offset_bytes: u32, value: u32) {
        self.ring.store_relaxed(offset_bytes, value);
    }

    #[inline]
    fn store_release(&self, offset_bytes: u32, value: u32) {
        self.ring.store_release(offset_bytes, value);
    }

    #[inline]
    fn full_fence(&self) {
        self.ring.full_fence();
    }

    #[inline]
    fn write_sqe(&self, slot: u32, sqe: &Sqe) {
        self.ring.write_sqe(slot, sqe);
    }

    #[inline]
    fn read_cqe(&self, offset_bytes: u32) -> Cqe {
        self.ring.read_cqe(offset_bytes)
    }
}
