//! Lost memory of the front-end: the front-end shortens a file that is mapped here, and the next access raises SIGBUS.
//!
//! The broker checks length and kind of each file when it maps the file, but only a seal prevents the front-end from
//! shortening it later, and not every front-end seals its files. The consequence depends on which memory is lost:
//!
//! * The in-flight region and the dirty log exist for the front-end alone. The broker replaces them by private memory,
//!   so that the guest continues. The front-end loses only its own records.
//! * Guest RAM holds the rings and requests, and the broker cannot continue without it: the process ends with SIGBUS,
//!   as it would anyway, and one line names the region.
//!
//! A request whose *data* is in lost memory fails alone (EFAULT), since the kernel moves the data.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::{fmt, io};

use nix::libc;
use nix::sys::signal::{SigHandler, Signal, signal};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vm_memory::{Address, GuestMemoryRegion, GuestRegionMmap, MmapRegion};
use vmm_sys_util::signal::register_signal_handler;

use crate::signal_line::Line;

/// Enough for the areas of a front-end with the most memory regions, and some more for those of earlier front-ends.
const AREAS_MAX: usize = 1024;

/// From now on the process survives lost memory other than guest RAM, and reports the loss of guest RAM in one line.
/// For programs: this changes the whole process.
///
/// # Errors
///
/// The kernel refuses; no known kernel does.
pub fn handle_lost_memory() -> io::Result<()> {
    register_signal_handler(libc::SIGBUS, on_sigbus).map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// The use of an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    InflightRegion,
    DirtyLog,
    GuestRam { gpa: u64 },
}

/// An area that is watched until this value is dropped, which must happen before the area is unmapped.
#[derive(Debug)]
pub(crate) struct Watched {
    /// `None`: the table is full. The line then cannot name this area.
    area: Option<&'static Area>,
}

impl Watched {
    /// Watches a mapping of a front-end's file.
    pub(crate) fn new(mapping: &MmapRegion, purpose: Purpose) -> Self {
        let area = AREAS.iter().find(|area| area.claim());
        if let Some(area) = area {
            area.publish(mapping.as_ptr() as usize, mapping.size(), purpose);
        }
        Self { area }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(area) = self.area {
            area.state.store(FREE, Ordering::Release);
        }
    }
}

/// Watches a region of guest RAM as long as it is referenced.
pub(crate) fn watch_ram(region: &Arc<GuestRegionMmap<()>>) {
    static REGIONS: Mutex<Vec<(Weak<GuestRegionMmap<()>>, Watched)>> = Mutex::new(Vec::new());
    let mut regions = REGIONS.lock().unwrap_or_else(PoisonError::into_inner);
    // A region may be unmapped while its entry is still here. That can give a wrong name to a loss that ends the
    // process, and does no other harm: `find` looks at all other areas first.
    regions.retain(|(region, _)| region.strong_count() > 0);
    let purpose = Purpose::GuestRam { gpa: region.start_addr().raw_value() };
    regions.push((Arc::downgrade(region), Watched::new(&region.get_mmap(), purpose)));
}

/// States of an area.
const FREE: u8 = 0;
const CLAIMED: u8 = 1;
const INFLIGHT_REGION: u8 = 2;
const DIRTY_LOG: u8 = 3;
const GUEST_RAM: u8 = 4;

/// A mapped area, readable by the signal handler at any time.
#[derive(Debug)]
struct Area {
    state: AtomicU8,
    start: AtomicUsize,
    len_bytes: AtomicUsize,
    gpa: AtomicU64,
}

static AREAS: [Area; AREAS_MAX] = [const {
    Area {
        state: AtomicU8::new(FREE),
        start: AtomicUsize::new(0),
        len_bytes: AtomicUsize::new(0),
        gpa: AtomicU64::new(0),
    }
}; AREAS_MAX];

impl Area {
    fn claim(&self) -> bool {
        self.state.compare_exchange(FREE, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    fn publish(&self, start: usize, len_bytes: usize, purpose: Purpose) {
        self.start.store(start, Ordering::Relaxed);
        self.len_bytes.store(len_bytes, Ordering::Relaxed);
        let state = match purpose {
            Purpose::InflightRegion => INFLIGHT_REGION,
            Purpose::DirtyLog => DIRTY_LOG,
            Purpose::GuestRam { gpa } => {
                self.gpa.store(gpa, Ordering::Relaxed);
                GUEST_RAM
            }
        };
        self.state.store(state, Ordering::Release);
    }

    fn purpose(&self) -> Option<Purpose> {
        match self.state.load(Ordering::Acquire) {
            INFLIGHT_REGION => Some(Purpose::InflightRegion),
            DIRTY_LOG => Some(Purpose::DirtyLog),
            GUEST_RAM => Some(Purpose::GuestRam { gpa: self.gpa.load(Ordering::Relaxed) }),
            _ => None,
        }
    }

    /// Replaces the area by private memory of this process. False: the kernel refuses.
    fn replace(&self) -> bool {
        let start = self.start.load(Ordering::Relaxed) as *mut c_void;
        let (len_bytes, protection) = (self.len_bytes.load(Ordering::Relaxed), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: the area is a mapping of a file that others write to at any time, so no code relies on its content,
        // and all accesses are volatile or atomic operations. The area is mapped now, because `Watched` is dropped
        // before the area is unmapped, and the new mapping has the same place, length and protection.
        unsafe { mmap_anonymous(start, len_bytes, protection, MapFlags::PRIVATE | MapFlags::FIXED) }.is_ok()
    }
}

fn find(address: usize) -> Option<(&'static Area, Purpose)> {
    let holders = || {
        AREAS.iter().filter_map(|area| {
            let purpose = area.purpose()?;
            let offset = address.checked_sub(area.start.load(Ordering::Relaxed))?;
            // The kernel maps whole pages.
            let len_bytes = area.len_bytes.load(Ordering::Relaxed).next_multiple_of(rustix::param::page_size());
            (offset < len_bytes).then_some((area, purpose))
        })
    };
    let is_exact = |(_, purpose): &(_, Purpose)| !matches!(purpose, Purpose::GuestRam { .. });
    holders().find(is_exact).or_else(|| holders().next())
}

/// Uses only what is safe in a signal handler: atomics, the stack, system calls. Returning repeats the access.
extern "C" fn on_sigbus(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t` to a handler with SA_SIGINFO, for this thread alone.
    let info = unsafe { &*info };
    if info.si_code <= 0 {
        return end_by_signal();
    }
    // SAFETY: this is a SIGBUS of the kernel's own, for which it sets the address.
    let address = unsafe { info.si_addr() } as usize;
    let name = match find(address) {
        Some((area, Purpose::InflightRegion)) if area.replace() => {
            return report(format_args!(
                "memory of the front-end's in-flight region is lost (SIGBUS): {}. The disk continues without the \
                 region; if this process ends, requests in flight are lost with it",
                SigbusCode(info.si_code)
            ));
        }
        Some((area, Purpose::DirtyLog)) if area.replace() => {
            return report(format_args!(
                "memory of the front-end's dirty log is lost (SIGBUS): {}. The disk continues, but this migration \
                 misses the pages that it writes",
                SigbusCode(info.si_code)
            ));
        }
        Some((_, Purpose::GuestRam { gpa })) => {
            return end(info.si_code, format_args!("the guest memory from guest address {gpa:#x} on"));
        }
        Some((_, Purpose::InflightRegion)) => "the in-flight region",
        Some((_, Purpose::DirtyLog)) => "the dirty log",
        None => "mapped memory of unknown use",
    };
    end(info.si_code, format_args!("{name}"));
}

/// The `si_code` of a SIGBUS: why the kernel sends it (sigaction(2)).
struct SigbusCode(c_int);

impl fmt::Display for SigbusCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            libc::BUS_MCEERR_AR | libc::BUS_MCEERR_AO => "the hardware has lost a page",
            _ => "the front-end has shortened the file, or its file system has no room for a new page",
        })
    }
}

/// Another process sent the signal: the signal ends this process, as it would without a handler.
fn end_by_signal() {
    restore_default_action();
    // The raised signal stays pending while the handler runs.
    if nix::sys::signal::raise(Signal::SIGBUS).is_err() {
        std::process::abort();
    }
}

/// Lets the repeated access end the process, so that a core dump shows the access.
fn end(si_code: c_int, lost: fmt::Arguments<'_>) {
    static IS_REPORTED: AtomicBool = AtomicBool::new(false);
    if !IS_REPORTED.swap(true, Ordering::Relaxed) {
        report(format_args!(
            "{lost} is lost (SIGBUS): {}. The server ends here, because the rings and requests in that memory are \
             gone; find out the reason, and start the server again",
            SigbusCode(si_code)
        ));
    }
    restore_default_action();
}

fn restore_default_action() {
    // SAFETY: the default disposition runs none of our code.
    if unsafe { signal(Signal::SIGBUS, SigHandler::SigDfl) }.is_err() {
        std::process::abort();
    }
}

fn report(what: fmt::Arguments<'_>) {
    Line::of(format_args!("ringpass: {what}")).write_to_stderr();
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn purpose_at(address: usize) -> Option<Purpose> {
        find(address).map(|(_, purpose)| purpose)
    }

    #[test]
    fn an_area_is_known_from_its_first_to_its_last_byte_until_it_is_dropped() {
        let mapping = MmapRegion::<()>::new(3 * 4096).unwrap();
        let start = mapping.as_ptr() as usize;
        let watched = Watched::new(&mapping, Purpose::DirtyLog);
        assert_eq!([start, start + 3 * 4096 - 1].map(purpose_at), [Some(Purpose::DirtyLog); 2]);
        assert_eq!([start - 1, start + 3 * 4096].map(purpose_at), [None; 2]);
        drop(watched);
        assert_eq!(purpose_at(start), None);
    }

    #[test]
    fn guest_ram_is_known_as_long_as_it_is_referenced() {
        let region = |gpa| {
            let mapping = MmapRegion::<()>::new(4096).unwrap();
            Arc::new(GuestRegionMmap::new(mapping, GuestAddress(gpa)).unwrap())
        };
        let first = region(1 << 20);
        let address = first.as_ptr() as usize;
        watch_ram(&first);
        let held = first.clone();
        drop(first);
        watch_ram(&region(2 << 20));
        assert_eq!(purpose_at(address), Some(Purpose::GuestRam { gpa: 1 << 20 }));
        drop(held);
        let other = region(3 << 20);
        watch_ram(&other);
        assert!(purpose_at(address) != Some(Purpose::GuestRam { gpa: 1 << 20 }), "its place may be used again");
    }
}
