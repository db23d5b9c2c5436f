//! A kernel ring for a guest: created disabled, restricted, then enabled, and observed until its end.
//!
//! [`KernelRing`] goes through three states, each a type:
//!
//! ```text
//! KernelRing<Disabled> --restrict()--> KernelRing<Restricted> --enable()--> KernelRing<Enabled> --close()--> RingEnd
//!   create(): disk, token;                                                   doorbell, eventfd,
//!   memory, eventfd, limits                                                  memory that is plugged
//! ```
//!
//! A ring that has not been restricted cannot be enabled, and everything that a guest may use is in place before the
//! ring runs.
//!
//! The guest owns the ring's memory from the start. The broker reads nothing back from it: the geometry is the one that
//! the kernel reported at creation, kept in [`RingLayout`]. And no thread ever waits for completions on a guest's ring
//! with `io_uring_enter`: the guest writes `cq.head`, and a wrong value can make the waiting thread spin in the kernel.

mod config;
mod doorbell;
mod end;
mod error;
mod gauge;
mod placement;
mod policy;
mod sq_thread;
mod still_running;
mod token;

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ringpass_guest_abi::RingLayout;
use ringpass_restrictions::CompiledPolicy;
use vmm_sys_util::eventfd::EventFd;

pub use config::{IoWorkers, RingConfig};
pub use doorbell::DoorbellThread;
pub(crate) use doorbell::{DoorbellId, borrow as borrow_eventfd, check_eventfd};
pub use end::{Keepalive, RingCloser, RingEnd};
pub use error::RingError;
pub use gauge::{GaugeReading, RingGauge};
pub use placement::{Placement, RingWindow};
pub(crate) use policy::refuse_unsafe;
pub use sq_thread::{SqThread, SqThreadConfig};
pub use still_running::StillRunning;
#[cfg(feature = "sandbox")]
pub(crate) use token::existing_token_directory;
pub use token::{token_directory, try_end_token};

use crate::memory::{ChangedSlots, PinnedMemory};
use crate::ring_fd::RingFd;
use token::EndToken;

/// State of a ring that does nothing yet and can still be given what the guest is to use.
#[derive(Debug)]
pub enum Disabled {}
/// State of a ring whose restrictions are in force and final.
#[derive(Debug)]
pub enum Restricted {}
/// State of a ring that executes what the guest submits.
#[derive(Debug)]
pub enum Enabled {}

/// The longest time in which a ring without I/O ends: three times the longest that was observed (Linux 6.18).
const GIVEN_UP: Duration = Duration::from_millis(200);

/// What consumes the SQ.
#[derive(Clone, Debug)]
pub enum Submission {
    /// A kernel thread that polls (`IORING_SETUP_SQPOLL`); the doorbell only wakes the thread.
    SqThread(Arc<SqThread>),
    /// A thread of the broker that enters the ring at each doorbell.
    Doorbell,
}

/// An io_uring for a guest, in state `S`.
///
/// Dropping it closes it; [`end`](Self::end) tells when it has ended.
#[derive(Debug)]
pub struct KernelRing<S> {
    /// None only while the value is being consumed.
    parts: Option<Parts>,
    state: PhantomData<S>,
}

#[derive(Debug)]
struct Parts {
    fd: Arc<RingFd>,
    layout: RingLayout,
    submission: Submission,
    window: Option<Arc<RingWindow>>,
    token: EndToken,
    closer: RingCloser,
    end: RingEnd,
}

impl KernelRing<Disabled> {
    /// Creates the ring, disabled, in the given place. Its fixed file 0 is the disk, and fixed file 1 the token by
    /// which `closer` detects the ring's real end.
    ///
    /// The calling thread becomes one of the ring's tasks: system calls in which it waits may return EINTR when the
    /// ring ends, and without an SQ thread its own io-wq workers get the ring's limits. [`DirectDevice`] uses a
    /// separate thread for that reason.
    ///
    /// # Errors
    ///
    /// The geometry is impossible for io_uring, the areas do not lie page-aligned inside guest RAM or overlap each
    /// other, or the kernel refuses; the error names what the kernel lacks.
    ///
    /// [`DirectDevice`]: crate::direct::DirectDevice
    pub fn create(
        config: RingConfig,
        submission: Submission,
        placement: &Placement<'_>,
        disk: BorrowedFd<'_>,
        closer: &RingCloser,
    ) -> Result<Self, RingError> {
        config.check()?;
        let token = EndToken::new().map_err(RingError::system("making the token for the ring's end"))?;
        let created = placement::create(config, &submission, placement)?;
        let ring = Self {
            parts: Some(Parts {
                fd: created.fd,
                layout: created.layout,
                submission,
                window: created.window.map(Arc::new),
                token,
                closer: closer.clone(),
                end: RingEnd::default(),
            }),
            state: PhantomData,
        };
        let registered = ring.fd().register_files(&[disk, ring.parts().token.as_fd()]);
        if let Err(source) = registered {
            // Without the token nothing tells when the ring, which has no I/O, stops writing to its areas. So wait long
            // enough.
            drop(ring);
            thread::sleep(GIVEN_UP);
            return Err(RingError::System { what: "registering the disk as fixed file 0", source });
        }
        Ok(ring)
    }

    /// Makes guest addresses valid in SQEs: the ring gets the pinned buffers.
    pub fn attach_memory(self, pinned: &PinnedMemory) -> Result<Self, RingError> {
        pinned.share_with(self.fd())?;
        Ok(self)
    }

    /// Makes the kernel signal `completion` for each completion that the guest has not muted.
    pub fn attach_completion(self, completion: &EventFd) -> Result<Self, RingError> {
        self.fd()
            .register_eventfd(completion_fd(completion))
            .map_err(RingError::system("registering the completion eventfd"))?;
        Ok(self)
    }

    /// Limits the kernel threads (io-wq workers) that execute requests that would block.
    pub fn limit_workers(self, workers: IoWorkers) -> Result<Self, RingError> {
        self.fd()
            .limit_workers(workers.bounded.get(), workers.unbounded.get())
            .map_err(RingError::system("limiting the ring's io-wq workers"))?;
        Ok(self)
    }

    /// Puts the policy in force for good.
    ///
    /// # Errors
    ///
    /// [`RingError::UnsafePolicy`] for a policy with lint errors that were not
    /// [accepted](CompiledPolicy::accept_unsafe); or the kernel refuses.
    pub fn restrict(self, policy: &CompiledPolicy) -> Result<KernelRing<Restricted>, RingError> {
        refuse_unsafe(policy)?;
        self.fd().restrict(policy.entries()).map_err(RingError::system("registering the ring's restrictions"))?;
        Ok(self.into_state())
    }
}

impl KernelRing<Restricted> {
    /// The effect of this ring's doorbell.
    pub(crate) fn doorbell(&self) -> doorbell::Target {
        let ring = self.fd().clone();
        match self.parts().submission {
            Submission::SqThread(_) => doorbell::Target::WakeSqThread(ring),
            Submission::Doorbell => doorbell::Target::Submit { ring, sq_entries: self.layout().sq_entries },
        }
    }

    /// Lets the ring run. From here on the kernel executes the guest's SQEs.
    pub fn enable(self) -> Result<KernelRing<Enabled>, RingError> {
        self.fd().enable().map_err(RingError::system("enabling the ring"))?;
        Ok(self.into_state())
    }
}

impl KernelRing<Enabled> {
    /// Counts the outstanding requests.
    ///
    /// # Errors
    ///
    /// `/proc` cannot be read.
    pub fn gauge(&self) -> Result<RingGauge, RingError> {
        RingGauge::new(self.fd()).map_err(RingError::system("opening the ring's file in /proc/self/fdinfo"))
    }

    /// Makes the kernel signal `completion` (or nothing) from now on, and signals the new eventfd once: otherwise a
    /// completion between the old eventfd and the new one would never interrupt.
    ///
    /// # Errors
    ///
    /// [`RingError::NotAnEventfd`]: the old eventfd stays.
    pub fn replace_completion(&self, completion: Option<&EventFd>) -> Result<(), RingError> {
        if let Some(completion) = completion {
            check_eventfd("completion", completion)?;
        }
        self.set_completion(completion)?;
        let Some(completion) = completion else { return Ok(()) };
        completion.write(1).map_err(RingError::system("signalling the new completion eventfd"))
    }

    /// The same for a file that is known to be an eventfd, and which the caller signals.
    pub(crate) fn set_completion(&self, completion: Option<&EventFd>) -> Result<(), RingError> {
        self.fd().unregister_eventfd().map_err(RingError::system("unregistering the completion eventfd"))?;
        let Some(completion) = completion else { return Ok(()) };
        self.fd()
            .register_eventfd(completion_fd(completion))
            .map_err(RingError::system("registering the completion eventfd"))
    }

    /// Gives the running ring the changed memory of `pinned`. Takes microseconds; I/O continues.
    /// All of the memory or none.
    pub fn replace_memory(&self, pinned: &PinnedMemory, slots: ChangedSlots) -> Result<(), RingError> {
        Ok(pinned.replace_slots(self.fd(), slots)?)
    }

    /// Ends the ring. Its I/O under way continues; [`RingEnd`] tells when that has ended too.
    ///
    /// `keepalive` is dropped at the real end and not before: it holds the guest memory that I/O may still reach, and
    /// the thread that entered the ring. All references to the ring's window must be gone already: a mapping of a ring
    /// keeps it running.
    pub fn close(mut self, keepalive: Keepalive) -> RingEnd {
        let end = self.end();
        self.hand_to_closer(keepalive);
        end
    }
}

impl<S> KernelRing<S> {
    /// The layout of the ring, for the guest. Fixed at creation.
    pub fn layout(&self) -> &RingLayout {
        &self.parts().layout
    }

    /// The ring's pages in this process, if the kernel allocated them.
    pub fn window(&self) -> Option<&Arc<RingWindow>> {
        self.parts().window.as_ref()
    }

    /// Tells when the ring has ended, once it is closed or dropped.
    pub fn end(&self) -> RingEnd {
        self.parts().end.clone()
    }

    fn parts(&self) -> &Parts {
        self.parts.as_ref().expect("taken only from a value that is being consumed")
    }

    pub(crate) fn fd(&self) -> &Arc<RingFd> {
        &self.parts().fd
    }

    fn into_state<T>(mut self) -> KernelRing<T> {
        KernelRing { parts: self.parts.take(), state: PhantomData }
    }

    /// Makes the ring closer close the ring, if the ring has not been handed on.
    fn hand_to_closer(&mut self, keepalive: Keepalive) {
        let Some(Parts { fd, layout: _, submission, window, token, closer, end }) = self.parts.take() else { return };
        closer.close(Box::new((fd, window)), token.released_to_ring(), Box::new((keepalive, submission)), &end);
    }
}

impl<S> Drop for KernelRing<S> {
    fn drop(&mut self) {
        self.hand_to_closer(Box::new(()));
    }
}

/// The descriptor of an `EventFd`, which itself offers only the raw descriptor.
fn completion_fd(eventfd: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    doorbell::borrow(eventfd)
}
