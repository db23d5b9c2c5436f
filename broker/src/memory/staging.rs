//! Pinning beside the table that keeps the buffers.
//!
//! The kernel charges a huge page once, and so looks for each huge page of a new buffer through all buffers of the same table
//! (`headpage_already_acct` in io_uring/rsrc.c): the time for a guest on huge pages grows with the square of its memory.
//! On Linux 6.18 that was 80 of 100 ms for 8 GiB. So the slots of a span are registered in a small table of their own, and
//! the table that keeps them clones them.

use super::MemoryError;
use super::layout::{Piece, Source, Span};
use super::region::GuestMemory;
use super::register::{Charge, new_holder, pin_span, register_table};
use crate::ring_fd::RingFd;

/// The largest page that lies inside of one span, wherever the file is mapped with that alignment: a huge page of x86-64 and of
/// AArch64 with 4 KiB pages.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// A ring whose table holds the slots of one span for a moment.
pub(super) struct Staging {
    ring: Option<RingFd>,
    /// The kernel clones slots to another place (Linux 6.13).
    is_usable: bool,
}

impl Staging {
    pub(super) fn new() -> Self {
        Self { ring: None, is_usable: true }
    }

    /// Pins a span and gives its slots to `holder`, which has nothing behind them yet: some kernels would lose that. False: this
    /// way is not for this span or this kernel, and nothing of it is pinned.
    pub(super) fn pin_span(
        &mut self,
        holder: &RingFd,
        memory: &GuestMemory,
        span: &Span,
        charge: &Charge,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<bool, MemoryError> {
        let (Some(first), Some(last)) = (span.slots.first(), span.slots.last()) else { return Ok(false) };
        if !self.is_usable || span.slots.len() == 1 || !keeps_its_huge_pages(memory, span) {
            return Ok(false);
        }
        let count = last.index + 1 - first.index;
        let ring = match self.ring.take() {
            Some(ring) => {
                register_table(&ring, count)?;
                ring
            }
            None => new_holder(count)?,
        };
        let pinned = pin_span(&ring, first.index, memory, span, charge, is_wanted);
        let cloned = pinned.map(|()| holder.clone_buffer_slots_to(first.index, &ring, 0, count));
        // Before the memory is pinned in another way, and not only when the kernel takes the ring apart.
        let emptied = ring.unregister_buffers();
        let cloned = cloned?;
        emptied.map_err(MemoryError::system("emptying the table in which a span was pinned"))?;
        match cloned {
            Ok(()) => {
                self.ring = Some(ring);
                Ok(true)
            }
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => {
                self.is_usable = false;
                Ok(false)
            }
            Err(source) => Err(MemoryError::System { what: "cloning the registered buffers of a span", source }),
        }
    }
}

/// Whether no huge page of the span belongs to another span, too: in tables of their own both would be charged.
fn keeps_its_huge_pages(memory: &GuestMemory, span: &Span) -> bool {
    span.pieces.iter().all(|piece: &Piece| match piece.source {
        Source::Region { region, offset_bytes } => {
            let region = &memory.regions()[region];
            let at_bytes = region.config.file_offset_bytes + offset_bytes;
            region.backing.page_bytes() <= HUGE_PAGE_BYTES && piece.gpa.abs_diff(at_bytes) % HUGE_PAGE_BYTES == 0
        }
        Source::Scratch => true,
    })
}
