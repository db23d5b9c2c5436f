//! Trying abilities with throw-away rings. The unsafe code of the probe.

use std::{
    ffi::c_void,
    fs::{self, File},
    io,
    os::fd::AsFd,
    ptr::NonNull,
    slice, thread,
    time::{Duration, Instant},
};

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use nix::libc::{EACCES, ENOMEM};
use ringpass_restrictions::{Access, KernelSupport, Policy};
use rustix::{
    event::{EventfdFlags, eventfd},
    fs::{MemfdFlags, memfd_create},
    io_uring::{IoringSetupFlags, io_uring_params},
    mm::{MapFlags, ProtFlags},
    thread::{CapabilitySet, CapabilitySets, set_capabilities},
};

use super::{Feature, Outcome};
use crate::kernel;
use crate::limits::while_memory_is_freed;
use crate::ring_fd::{RingFd, RingPages};

/// The kernel's page size on every architecture that ringpass supports.
const PAGE_BYTES: usize = 4096;
/// The kernel's limit on registered buffers (`IORING_MAX_REG_BUFFERS`).
const BUFFER_SLOTS_MAX: u32 = 1 << 14;
/// How long an idle SQ thread spins: the shortest time possible, since nothing is ever submitted.
const SQ_THREAD_IDLE_MS: u32 = 1;
/// How long the start of an SQ thread may take on a busy machine, and how often the trial checks for it.
const SQ_THREAD_START: Duration = Duration::from_secs(1);
const SQ_THREAD_LOOK: Duration = Duration::from_micros(100);

/// A step that failed, and why.
struct Failure {
    step: &'static str,
    errno: Option<i32>,
}

type Trial = Result<(), Failure>;

/// Names the step that failed.
trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, Failure> {
        self.map_err(|error| Failure { step, errno: error.into().raw_os_error() })
    }
}

impl From<Trial> for Outcome {
    fn from(trial: Trial) -> Self {
        match trial {
            Ok(()) => Self::Works,
            Err(Failure { step, errno }) => Self::Failed { step, errno },
        }
    }
}

/// Runs trials in a thread of their own: worker limits and capabilities are properties of the thread.
pub(super) fn in_own_thread<T: Send + 'static>(trials: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let thread = thread::Builder::new().name("ringpass-probe".into()).spawn(trials)?;
    thread.join().map_err(|_| io::Error::other("it panicked"))
}

/// Tries the simplest ring, which Linux has since 5.1.
pub(super) fn simplest_ring() -> Outcome {
    let setup = || RingFd::setup(1, &mut io_uring_params::default()).map(|_| ());
    while_memory_is_freed(setup, |error| error.raw_os_error() == Some(ENOMEM)).step("io_uring_setup").into()
}

/// Asks for the operations and restrictions that the kernel supports.
pub(super) fn support() -> Result<KernelSupport, Outcome> {
    let step = "asking the kernel what it restricts";
    kernel::support().map_err(|error| Outcome::Failed { step, errno: error.raw_os_error() })
}

/// Tries every feature; the trials without capabilities only if `may_drop_capabilities`.
pub(super) fn all(support: Option<&KernelSupport>, may_drop_capabilities: bool) -> Vec<(Feature, Outcome)> {
    let outcome = |feature| match feature {
        Feature::Restrictions => support.map_or(Outcome::NotTried, |support| restrictions(support).into()),
        Feature::LargeBufferTable => large_buffer_table().into(),
        Feature::PinnedMemory => pinned_memory().map(|_| ()).into(),
        Feature::CompletionEventfd => completion_eventfd().into(),
        Feature::WorkerLimits => worker_limits().into(),
        Feature::NoSqArray => ring(IoringSetupFlags::NO_SQARRAY).map(|_| ()).into(),
        Feature::CallerMemory => caller_memory().into(),
        Feature::ScatteredCallerMemory => scattered_caller_memory().into(),
        Feature::SubmissionPolling => submission_polling().into(),
        Feature::UnprivilegedSubmissionPolling if !may_drop_capabilities => Outcome::NotTried,
        Feature::UnprivilegedSubmissionPolling => unprivileged_submission_polling().into(),
        Feature::SharedSubmissionThread => shared_submission_thread().into(),
        Feature::ClonedBuffers => cloned_buffers().into(),
        Feature::ClonedBufferSlots => cloned_buffer_slots().into(),
    };
    Feature::ALL.into_iter().map(|feature| (feature, outcome(feature))).collect()
}

fn params(flags: IoringSetupFlags, cq_entries: u32) -> io_uring_params {
    let mut params = io_uring_params::default();
    params.flags = flags | IoringSetupFlags::R_DISABLED | IoringSetupFlags::CQSIZE;
    params.cq_entries = cq_entries;
    params.sq_thread_idle = SQ_THREAD_IDLE_MS;
    params
}

/// A disabled ring whose memory the kernel allocates. Nothing is ever submitted to it.
fn ring(flags: IoringSetupFlags) -> Result<RingFd, Failure> {
    RingFd::setup(8, &mut params(flags, 16)).step("io_uring_setup")
}

fn restrictions(support: &KernelSupport) -> Trial {
    let ring = ring(IoringSetupFlags::empty())?;
    let Ok(policy) = Policy::direct(Access::ReadOnly).compile(support) else {
        return Err(Failure { step: "compiling the direct policy for this kernel", errno: None });
    };
    ring.restrict(policy.entries()).step("IORING_REGISTER_RESTRICTIONS")?;
    ring.enable().step("IORING_REGISTER_ENABLE_RINGS")?;
    match ring.register_empty_buffers(1) {
        Err(error) if error.raw_os_error() == Some(EACCES) => Ok(()),
        _ => Err(Failure { step: "refusing what the policy does not allow", errno: None }),
    }
}

fn large_buffer_table() -> Trial {
    ring(IoringSetupFlags::empty())?.register_empty_buffers(BUFFER_SLOTS_MAX).step("IORING_REGISTER_BUFFERS2")
}

/// A ring with one page of a memfd pinned in slot 0 of two.
fn pinned_memory() -> Result<RingFd, Failure> {
    let ring = ring(IoringSetupFlags::empty())?;
    ring.register_empty_buffers(2).step("IORING_REGISTER_BUFFERS2")?;
    let memory = Pages::of_memfd(&[0])?;
    let start = memory.page(0).as_ptr() as u64;
    let page = start..start + PAGE_BYTES as u64;
    // SAFETY: the page is a shared mapping to which no Rust reference is ever made, and the ring, which stays disabled,
    // never uses it.
    let pinned = unsafe { ring.pin_buffers(0, slice::from_ref(&page)) };
    pinned.map_err(|(_, error)| error).step("IORING_REGISTER_BUFFERS_UPDATE")?;
    Ok(ring)
}

fn completion_eventfd() -> Trial {
    let ring = ring(IoringSetupFlags::empty())?;
    let eventfd = eventfd(0, EventfdFlags::CLOEXEC).step("eventfd")?;
    ring.register_eventfd(eventfd.as_fd()).step("IORING_REGISTER_EVENTFD")?;
    ring.unregister_eventfd().step("IORING_UNREGISTER_EVENTFD")?;
    Ok(())
}

fn worker_limits() -> Trial {
    ring(IoringSetupFlags::empty())?.limit_workers(8, 1).step("IORING_REGISTER_IOWQ_MAX_WORKERS")
}

/// Tries one page for each area: 8 SQEs and 16 CQEs take less than a page each.
fn caller_memory() -> Trial {
    ring_in(&Pages::of_memfd(&[0, 1])?, 1, 8, 16)
}

/// Maps the same pages once in the order of the file and once in reverse. They cannot be in physical order both times,
/// so a kernel that needs contiguous memory refuses one of the rings.
fn scattered_caller_memory() -> Trial {
    // 64 SQEs are 64 * 64 bytes: 256 SQEs are 4 pages; 512 CQEs of 16 bytes after the header are 3 pages.
    let rising = Pages::of_memfd(&[0, 1, 2, 3, 4, 5, 6, 7])?;
    ring_in(&rising, 4, 256, 512)?;
    let falling = rising.in_order(&[7, 6, 5, 4, 3, 2, 1, 0])?;
    ring_in(&falling, 4, 256, 512)
}

/// Makes a ring in `memory`, with the SQEs from page `sqes_page` on.
fn ring_in(memory: &Pages, sqes_page: usize, sq_entries: u32, cq_entries: u32) -> Trial {
    let pages = RingPages { rings: memory.page(0), sqes: memory.page(sqes_page) };
    // NO_SQARRAY has a trial of its own: without it the SQ array follows the CQEs, and still fits.
    let mut params = params(IoringSetupFlags::empty(), cq_entries);
    // SAFETY: shared mappings of a memfd to which no Rust reference is ever made. The rings area has the 64 bytes of
    // the header, 16 for each CQE and 4 for each SQE of the SQ array, in less than `sqes_page` pages; the SQEs have 64
    // bytes each in the pages from there on.
    unsafe { RingFd::setup_in(sq_entries, &mut params, pages) }.step("io_uring_setup with IORING_SETUP_NO_MMAP")?;
    Ok(())
}

fn submission_polling() -> Trial {
    ring(IoringSetupFlags::SQPOLL).map(|_| ())
}

fn unprivileged_submission_polling() -> Trial {
    let trial = in_own_thread(|| {
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        set_capabilities(None, sets).step("dropping the capabilities of a thread")?;
        submission_polling()
    });
    trial.step("starting a thread")?
}

fn shared_submission_thread() -> Trial {
    let owner = ring(IoringSetupFlags::SQPOLL)?;
    let mut params = params(IoringSetupFlags::SQPOLL | IoringSetupFlags::ATTACH_WQ, 16);
    params.wq_fd = owner.raw();
    let second = RingFd::setup(8, &mut params).step("io_uring_setup with IORING_SETUP_ATTACH_WQ")?;
    match (sq_thread(&owner), sq_thread(&second)) {
        (Some(first), Some(second)) if first != second => {
            Err(Failure { step: "putting both rings on one thread", errno: None })
        }
        // The kernel does not report the thread while the ring is busy. Then its success at set-up must suffice.
        _ => Ok(()),
    }
}

/// The thread id of a ring's SQ thread, if `/proc` shows it.
fn sq_thread(ring: &RingFd) -> Option<u32> {
    let us = rustix::thread::gettid().as_raw_nonzero().get() as u32;
    let end = Instant::now() + SQ_THREAD_START;
    loop {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", ring.raw())).ok()?;
        let thread = text.lines().find_map(|line| line.strip_prefix("SqThread:"))?.trim().parse().ok()?;
        // The kernel names the thread that made the ring until the SQ thread has run (`io_sq_thread` in
        // io_uring/sqpoll.c).
        if thread != us {
            return Some(thread);
        }
        if Instant::now() >= end {
            return None;
        }
        thread::sleep(SQ_THREAD_LOOK);
    }
}

fn cloned_buffers() -> Trial {
    let source = pinned_memory()?;
    ring(IoringSetupFlags::empty())?.clone_buffers(&source).step("IORING_REGISTER_CLONE_BUFFERS")
}

fn cloned_buffer_slots() -> Trial {
    let source = pinned_memory()?;
    let ring = ring(IoringSetupFlags::empty())?;
    ring.register_empty_buffers(2).step("IORING_REGISTER_BUFFERS2")?;
    ring.clone_buffer_slots(&source, 0, 1).step("IORING_REGISTER_CLONE_BUFFERS with IORING_REGISTER_DST_REPLACE")
}

/// Pages of a memfd, mapped in any order.
struct Pages {
    file: File,
    mapping: MmapRaw,
}

impl Pages {
    /// A new memfd with as many pages as `order` names, mapped in that order.
    fn of_memfd(order: &[usize]) -> Result<Self, Failure> {
        let file = File::from(memfd_create("ringpass-probe", MemfdFlags::CLOEXEC).step("memfd_create")?);
        file.set_len((order.len() * PAGE_BYTES) as u64).step("ftruncate")?;
        Self::map(file, order)
    }

    /// The same pages, mapped once more in another order.
    fn in_order(&self, order: &[usize]) -> Result<Self, Failure> {
        Self::map(self.file.try_clone().step("dup")?, order)
    }

    fn map(file: File, order: &[usize]) -> Result<Self, Failure> {
        let reserved: MmapMut = MmapOptions::new().len(order.len() * PAGE_BYTES).map_anon().step("mmap")?;
        let mapping = MmapRaw::from(reserved);
        for (index, page) in order.iter().enumerate() {
            let address: *mut c_void = mapping.as_mut_ptr().wrapping_add(index * PAGE_BYTES).cast();
            let access = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: the address is inside `mapping`, which is ours alone and to which no reference exists: no other
            // code can notice that one of its pages is replaced. Dropping `mapping` unmaps the replacement.
            unsafe { rustix::mm::mmap(address, PAGE_BYTES, access, flags, &file, (page * PAGE_BYTES) as u64) }
                .step("mmap")?;
        }
        Ok(Self { file, mapping })
    }

    /// The address of the page that was mapped `index`-th.
    fn page(&self, index: usize) -> NonNull<u8> {
        assert!((index + 1) * PAGE_BYTES <= self.mapping.len());
        NonNull::new(self.mapping.as_mut_ptr().wrapping_add(index * PAGE_BYTES)).expect("a mapping is not at address 0")
    }
}

#[cfg(test)]
mod tests {
    use std::hint::spin_loop;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn pages_are_mapped_in_the_requested_order() {
        let rising = Pages::of_memfd(&[0, 1, 2]).ok().unwrap();
        for page in 0..3u8 {
            rising.file.write_all_at(&[page + 1], u64::from(page) * PAGE_BYTES as u64).unwrap();
        }
        let falling = rising.in_order(&[2, 1, 0]).ok().unwrap();
        // SAFETY: the pages are mapped, and no other code writes to them.
        let first = |pages: &Pages, index| unsafe { pages.page(index).read_volatile() };
        assert_eq!([0, 1, 2].map(|index| first(&rising, index)), [1, 2, 3]);
        assert_eq!([0, 1, 2].map(|index| first(&falling, index)), [3, 2, 1]);
    }

    /// The name of the thread that is taken for the SQ thread of a new ring.
    fn name_of_sq_thread() -> Option<String> {
        let ring = ring(IoringSetupFlags::SQPOLL).ok().unwrap();
        let end = Instant::now() + 20 * SQ_THREAD_START;
        loop {
            match sq_thread(&ring) {
                Some(thread) => return fs::read_to_string(format!("/proc/self/task/{thread}/comm")).ok(),
                // The kernel does not tell while the ring is busy.
                None if Instant::now() < end => thread::sleep(SQ_THREAD_LOOK),
                None => return None,
            }
        }
    }

    /// On a busy machine the SQ thread does not run at once.
    #[test]
    fn an_sq_thread_that_has_not_run_yet_is_not_confused_with_the_thread_that_made_its_ring() {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 * thread::available_parallelism().unwrap().get() {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        spin_loop();
                    }
                });
            }
            let named: Vec<_> = (0..20).map(|_| name_of_sq_thread()).collect();
            is_over.store(true, Ordering::Relaxed);
            // The thread that made the ring has another name.
            assert!(named.iter().flatten().all(|name| name.starts_with("iou-sqp-")), "{named:?}");
            assert!(named.iter().all(Option::is_some), "the kernel names no SQ thread: {named:?}");
        });
    }

    #[test]
    fn a_failed_step_is_named_with_its_error() {
        let refused: io::Result<()> = Err(io::Error::from_raw_os_error(1));
        assert_eq!(Outcome::from(refused.step("a step")), Outcome::Failed { step: "a step", errno: Some(1) });
    }

    #[test]
    fn trials_leave_the_caller_unchanged() {
        let before = rustix::thread::capabilities(None).unwrap();
        assert_eq!(in_own_thread(simplest_ring).unwrap(), Outcome::Works);
        in_own_thread(unprivileged_submission_polling).unwrap().ok().unwrap();
        assert_eq!(rustix::thread::capabilities(None).unwrap(), before);
    }
}
