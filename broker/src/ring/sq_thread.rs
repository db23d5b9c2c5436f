//! The kernel thread that polls the SQs of a device's queues.

use std::time::Duration;

use rustix::io_uring::{IoringSetupFlags, io_uring_params};

use super::RingError;
use super::sys::RingFd;

/// How an SQ thread behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SqThreadConfig {
    /// How long it polls without finding anything before it sleeps; whole milliseconds, at least 1. Waking it then
    /// takes a doorbell and some microseconds (and up to a timer tick on an idle core).
    pub idle: Duration,
    /// The CPU it is bound to. It needs a core to itself: anything else that runs there makes I/O ten to a hundred
    /// times slower.
    pub cpu: Option<u32>,
}

impl Default for SqThreadConfig {
    fn default() -> Self {
        Self { idle: Duration::from_millis(50), cpu: None }
    }
}

/// One SQ thread for any number of rings (`IORING_SETUP_ATTACH_WQ`).
///
/// A ring can only share the thread of a ring that exists. So the thread belongs to a ring of its own, which is never
/// enabled: queues come and go, and a second thread never starts beside one that is ending.
#[derive(Debug)]
pub struct SqThread {
    owner: RingFd,
    config: SqThreadConfig,
}

impl SqThread {
    /// Starts the thread.
    pub fn start(config: SqThreadConfig) -> Result<Self, RingError> {
        let mut params = io_uring_params::default();
        params.flags = IoringSetupFlags::SQPOLL | IoringSetupFlags::R_DISABLED;
        config.apply(&mut params);
        if let Some(cpu) = config.cpu {
            params.flags |= IoringSetupFlags::SQ_AFF;
            params.sq_thread_cpu = cpu;
        }
        let owner = RingFd::setup(1, &mut params).map_err(|source| match config.cpu {
            Some(cpu) if source.raw_os_error() == Some(nix::libc::EINVAL) => RingError::SqThreadCpu { cpu, source },
            _ => RingError::Create { in_guest_ram: false, source },
        })?;
        Ok(Self { owner, config })
    }

    /// Makes the ring that `params` describe use this thread.
    pub(super) fn attach(&self, params: &mut io_uring_params) {
        params.flags |= IoringSetupFlags::SQPOLL | IoringSetupFlags::ATTACH_WQ;
        params.wq_fd = self.owner.raw();
        // The thread sleeps after the longest idle time of its rings.
        self.config.apply(params);
    }
}

impl SqThreadConfig {
    fn apply(self, params: &mut io_uring_params) {
        // 0 would mean the kernel's default of one second.
        params.sq_thread_idle = u32::try_from(self.idle.as_millis()).unwrap_or(u32::MAX).max(1);
    }
}
