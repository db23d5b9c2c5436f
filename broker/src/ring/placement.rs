//! The place of a ring's memory: in guest RAM, or in a window that the embedder shows to the guest.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use memmap2::{MmapOptions, MmapRaw};
use ringpass_guest_abi::{Doorbell, RingLayout, rings_area_bytes, sqes_area_bytes};
use rustix::io_uring::{IORING_OFF_SQ_RING, IORING_OFF_SQES, IoringSetupFlags, io_uring_params};

use super::{RingConfig, RingError, Submission};
use crate::memory::GuestMemory;
use crate::ring_fd::{RingFd, RingPages};

/// Page size of ring memory.
const PAGE_BYTES: u64 = 4096;
/// The bytes that the guest ABI reserves in front of the CQEs (see [`rings_area_bytes`]).
const HEADER_BYTES_MAX: u32 = 1024;

/// The place of a ring's memory.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Placement<'a> {
    /// In guest RAM, at addresses that the driver chose (`IORING_SETUP_NO_MMAP`, Linux 6.5; more than one page that is
    /// not physically contiguous: Linux 6.10). Both areas are overwritten with zeroes first.
    GuestRam {
        /// The guest's RAM.
        memory: &'a GuestMemory,
        /// Guest-physical address of the rings area, [`rings_area_bytes`] long, aligned to 4096.
        rings_gpa: u64,
        /// Guest-physical address of the SQE area, [`sqes_area_bytes`] long, aligned to 4096.
        sqes_gpa: u64,
    },
    /// In pages that the kernel allocates and this process maps: for embedders that show the pages to the guest through
    /// a memory slot, and for guests in the same process.
    Window,
}

/// The pages of a ring that the kernel allocated, mapped in this process.
///
/// The mapping keeps the ring alive *and running*: drop it, and everything that was made from its addresses, before you
/// expect the ring to end.
#[derive(Debug)]
pub struct RingWindow {
    rings: MmapRaw,
    sqes: MmapRaw,
}

impl RingWindow {
    /// Host address of the rings area; page-aligned.
    pub fn rings(&self) -> NonNull<u8> {
        NonNull::new(self.rings.as_mut_ptr()).expect("a mapping is not at address 0")
    }

    /// Length of the rings area in bytes, in whole pages.
    pub fn rings_bytes(&self) -> u64 {
        self.rings.len() as u64
    }

    /// Host address of the SQE area; page-aligned.
    pub fn sqes(&self) -> NonNull<u8> {
        NonNull::new(self.sqes.as_mut_ptr()).expect("a mapping is not at address 0")
    }

    /// Length of the SQE area in bytes, in whole pages.
    pub fn sqes_bytes(&self) -> u64 {
        self.sqes.len() as u64
    }
}

/// A newly created ring.
pub(super) struct Created {
    pub(super) fd: Arc<RingFd>,
    pub(super) layout: RingLayout,
    pub(super) window: Option<RingWindow>,
}

/// Creates a disabled ring.
pub(super) fn create(
    config: RingConfig,
    submission: &Submission,
    placement: &Placement<'_>,
) -> Result<Created, RingError> {
    match submission {
        Submission::SqThread(thread) => thread.run(|attach| create_with(config, attach, placement)),
        Submission::Doorbell => create_with(config, &|_| {}, placement),
    }
}

/// Creates a disabled ring whose parameters `attach` completes.
fn create_with(
    config: RingConfig,
    attach: &dyn Fn(&mut io_uring_params),
    placement: &Placement<'_>,
) -> Result<Created, RingError> {
    let mut params = params(config);
    attach(&mut params);
    let entries = config.sq_entries;
    let failed = |in_guest_ram| move |source| RingError::Create { in_guest_ram, source };
    match *placement {
        Placement::GuestRam { memory, rings_gpa, sqes_gpa } => {
            let areas = Areas::new(config, rings_gpa, sqes_gpa)?;
            let pages = areas.in_guest_ram(memory)?;
            check_header()?;
            // The kernel zeroes only its own words, and the guest may have left any values in the others.
            memory.zero(areas.rings_gpa, areas.rings_bytes)?;
            memory.zero(areas.sqes_gpa, areas.sqes_bytes)?;
            // SAFETY: both areas lie inside mapped regions of guest RAM, which is shared memory that this process
            // accesses only through vm-memory's volatile operations; the sizes are those that the kernel will use,
            // because the header fits (`check_header`).
            let fd = unsafe { RingFd::setup_in(entries, &mut params, pages) }.map_err(failed(true))?;
            let layout = layout(&params, areas.rings_bytes, areas.sqes_bytes);
            layout.validate()?;
            Ok(Created { fd: Arc::new(fd), layout, window: None })
        }
        Placement::Window => {
            let fd = RingFd::setup(entries, &mut params).map_err(failed(false))?;
            let rings_bytes = u64::from(params.cq_off.cqes) + u64::from(params.cq_entries) * 16;
            let window = RingWindow {
                rings: map(&fd, IORING_OFF_SQ_RING, rings_bytes.next_multiple_of(PAGE_BYTES))?,
                sqes: map(&fd, IORING_OFF_SQES, sqes_area_bytes(params.sq_entries))?,
            };
            let layout = layout(&params, window.rings_bytes(), window.sqes_bytes());
            layout.validate()?;
            Ok(Created { fd: Arc::new(fd), layout, window: Some(window) })
        }
    }
}

/// The two areas of a ring in guest RAM, checked against each other.
struct Areas {
    rings_gpa: u64,
    rings_bytes: u64,
    sqes_gpa: u64,
    sqes_bytes: u64,
}

impl Areas {
    fn new(config: RingConfig, rings_gpa: u64, sqes_gpa: u64) -> Result<Self, RingError> {
        let rings_bytes = rings_area_bytes(config.cq_entries);
        let sqes_bytes = sqes_area_bytes(config.sq_entries);
        for (area, gpa) in [("rings", rings_gpa), ("SQE", sqes_gpa)] {
            if gpa % PAGE_BYTES != 0 {
                return Err(RingError::Unaligned { area, gpa });
            }
        }
        // Saturating: an area at the very top is refused later as outside RAM.
        let disjoint =
            rings_gpa.saturating_add(rings_bytes) <= sqes_gpa || sqes_gpa.saturating_add(sqes_bytes) <= rings_gpa;
        if !disjoint {
            return Err(RingError::AreasOverlap { rings_gpa, rings_bytes, sqes_gpa, sqes_bytes });
        }
        Ok(Self { rings_gpa, rings_bytes, sqes_gpa, sqes_bytes })
    }

    /// The host addresses of the areas, if both lie in guest RAM.
    fn in_guest_ram(&self, memory: &GuestMemory) -> Result<RingPages, RingError> {
        let address = |gpa, len_bytes| -> Result<_, RingError> {
            Ok(NonNull::new(memory.host_address(gpa, len_bytes)?).expect("a mapping is not at address 0"))
        };
        Ok(RingPages {
            rings: address(self.rings_gpa, self.rings_bytes)?,
            sqes: address(self.sqes_gpa, self.sqes_bytes)?,
        })
    }
}

/// The common parameters of all guests' rings: disabled, without an SQ array (Linux 6.6), with a CQ of its own size,
/// and not stopping a batch at an SQE that fails (Linux 5.18).
fn params(config: RingConfig) -> io_uring_params {
    let mut params = io_uring_params::default();
    params.cq_entries = config.cq_entries;
    params.flags = IoringSetupFlags::R_DISABLED
        | IoringSetupFlags::NO_SQARRAY
        | IoringSetupFlags::CQSIZE
        | IoringSetupFlags::SUBMIT_ALL;
    params
}

/// The kernel's offsets in the form that the guest gets.
fn layout(params: &io_uring_params, rings_bytes: u64, sqes_bytes: u64) -> RingLayout {
    let polled = params.flags.contains(IoringSetupFlags::SQPOLL);
    RingLayout {
        sq_entries: params.sq_entries,
        cq_entries: params.cq_entries,
        sq_head_offset: params.sq_off.head,
        sq_tail_offset: params.sq_off.tail,
        sq_flags_offset: params.sq_off.flags,
        cq_head_offset: params.cq_off.head,
        cq_tail_offset: params.cq_off.tail,
        cq_flags_offset: params.cq_off.flags,
        cqes_offset: params.cq_off.cqes,
        rings_bytes,
        sqes_bytes,
        doorbell: if polled { Doorbell::WhenAsleep } else { Doorbell::Always },
    }
}

/// Checks that the header of this kernel's rings fits in front of the CQEs, by creating the smallest possible ring:
/// otherwise the kernel would use more of guest RAM than the driver set aside.
fn check_header() -> Result<(), RingError> {
    static HEADER_BYTES: OnceLock<u32> = OnceLock::new();
    let header_bytes = match HEADER_BYTES.get() {
        Some(bytes) => *bytes,
        None => {
            let mut params = params(RingConfig { sq_entries: 1, cq_entries: 1 });
            RingFd::setup(1, &mut params).map_err(|source| RingError::Create { in_guest_ram: false, source })?;
            *HEADER_BYTES.get_or_init(|| params.cq_off.cqes)
        }
    };
    if header_bytes > HEADER_BYTES_MAX { Err(RingError::HeaderTooLarge { header_bytes }) } else { Ok(()) }
}

fn map(fd: &RingFd, offset_bytes: u64, len_bytes: u64) -> Result<MmapRaw, RingError> {
    MmapOptions::new()
        .offset(offset_bytes)
        .len(len_bytes as usize)
        .map_raw(&fd.as_fd())
        .map_err(RingError::system("mapping the ring's pages"))
}
