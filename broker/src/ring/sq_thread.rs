//! The kernel thread that polls the SQs of a device's queues.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::io_uring::{IoringSetupFlags, io_uring_params};

use super::RingError;
use super::placement::Created;
use crate::ring_fd::RingFd;

/// The configuration of an SQ thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SqThreadConfig {
    /// How long the thread polls in vain before it sleeps; whole milliseconds, at least 1. Waking it then
    /// takes a doorbell and some microseconds (and up to a timer tick on an idle core).
    pub idle: Duration,
    /// The CPU to which the thread is bound. It needs a core to itself: anything else that runs there makes I/O ten to
    /// a hundred times slower.
    pub cpu: Option<u32>,
}

impl SqThreadConfig {
    /// A thread that sleeps when it has found nothing for `idle`, on any CPU.
    pub const fn new(idle: Duration) -> Self {
        Self { idle, cpu: None }
    }

    /// Sets [`idle`](Self#structfield.idle).
    #[must_use]
    pub fn idle(self, idle: Duration) -> Self {
        Self { idle, ..self }
    }

    /// Sets [`cpu`](Self#structfield.cpu).
    #[must_use]
    pub fn cpu(self, cpu: impl Into<Option<u32>>) -> Self {
        Self { cpu: cpu.into(), ..self }
    }
}

impl Default for SqThreadConfig {
    fn default() -> Self {
        Self { idle: Duration::from_millis(50), cpu: None }
    }
}

/// One SQ thread for the rings of a device (`IORING_SETUP_ATTACH_WQ`).
///
/// The first ring starts the thread, and each further ring shares the thread of an existing ring. No
/// idle ring keeps the thread alive: with more than one ring the kernel takes at most 8 SQEs from each in
/// turn, which costs a device with one queue a tenth of its speed at depth 32 (measured on Linux 6.18).
#[derive(Debug)]
pub struct SqThread {
    config: SqThreadConfig,
    /// Held while a ring is created, so that two rings do not both start a thread.
    rings: Mutex<Vec<Weak<RingFd>>>,
}

impl SqThread {
    /// Refuses a configuration with which no ring can be created. The thread itself starts with the first ring.
    pub fn new(config: SqThreadConfig) -> Result<Self, RingError> {
        let mut params = io_uring_params::default();
        params.flags = IoringSetupFlags::R_DISABLED;
        config.start_thread(&mut params);
        RingFd::setup(1, &mut params).map_err(|source| match config.cpu {
            Some(cpu) if source.raw_os_error() == Some(nix::libc::EINVAL) => RingError::SqThreadCpu { cpu, source },
            _ => RingError::Create { in_guest_ram: false, source },
        })?;
        Ok(Self { config, rings: Mutex::default() })
    }

    /// Lets `create` make a ring of this thread: `create` applies the function that it gets to the ring's parameters.
    pub(super) fn run(
        &self,
        create: impl FnOnce(&dyn Fn(&mut io_uring_params)) -> Result<Created, RingError>,
    ) -> Result<Created, RingError> {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        // Held until the new ring exists, so that the shared thread does not end before.
        let running = rings.iter().find_map(Weak::upgrade);
        let created = create(&|params| match &running {
            Some(ring) => {
                params.flags |= IoringSetupFlags::SQPOLL | IoringSetupFlags::ATTACH_WQ;
                params.wq_fd = ring.raw();
                // The thread sleeps after the longest idle time of its rings.
                self.config.set_idle(params);
            }
            None => self.config.start_thread(params),
        })?;
        rings.retain(|ring| ring.strong_count() > 0);
        rings.push(Arc::downgrade(&created.fd));
        Ok(created)
    }
}

impl SqThreadConfig {
    /// Makes a ring start a thread of its own.
    fn start_thread(self, params: &mut io_uring_params) {
        params.flags |= IoringSetupFlags::SQPOLL;
        self.set_idle(params);
        if let Some(cpu) = self.cpu {
            params.flags |= IoringSetupFlags::SQ_AFF;
            params.sq_thread_cpu = cpu;
        }
    }

    fn set_idle(self, params: &mut io_uring_params) {
        // 0 would mean the kernel's default of one second.
        params.sq_thread_idle = u32::try_from(self.idle.as_millis()).unwrap_or(u32::MAX).max(1);
    }
}
