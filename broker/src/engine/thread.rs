//! A worker's thread, from its start to its end.

use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use rustix::thread::{CpuSet, sched_setaffinity};

use super::EngineError;
use super::ring::{self, Ring, RingPolicy};
use super::worker::{Worker, WorkerParts};
use crate::disk::Disk;
use crate::threads::{AbortOnPanic, leave_signals_to_others};

/// Where a worker's thread is to run, and what its io_uring is to be.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Number of the worker.
    pub(super) number: usize,
    /// Its CPU. `None`: the kernel chooses.
    pub(super) cpu: Option<usize>,
    /// The largest number of completions that can be outstanding.
    pub(super) completions_max: u32,
    /// What its io_uring may do.
    pub(super) ring_policy: RingPolicy,
}

/// Starts a worker, and returns when it is ready. The thread gives the disk that it had at its end.
pub(super) fn start(
    place: Place,
    parts: impl FnOnce() -> WorkerParts + Send + 'static,
) -> Result<JoinHandle<Option<Arc<Disk>>>, EngineError> {
    let (ready, is_ready) = sync_channel(1);
    let thread = thread::Builder::new()
        .name(format!("worker-{}", place.number))
        .spawn(move || live(place, parts, &ready))
        .map_err(EngineError::Thread)?;
    match is_ready.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(EngineError::Thread(io::Error::other("it ended before it was ready"))),
    }
}

fn live(
    place: Place,
    parts: impl FnOnce() -> WorkerParts,
    ready: &SyncSender<Result<(), EngineError>>,
) -> Option<Arc<Disk>> {
    leave_signals_to_others();
    let tell = |result| ready.send(result).is_ok();
    if let Some(Err(error)) = place.cpu.map(pin) {
        tell(Err(error));
        return None;
    }
    // Only the thread that enables an io_uring may use it.
    let mut ring = match ring::open(place.completions_max, &place.ring_policy) {
        Ok(ring) => ring,
        Err(error) => {
            tell(Err(error));
            return None;
        }
    };
    let ring = match Ring::new(&mut ring) {
        Ok(ring) => ring,
        Err(error) => {
            tell(Err(error));
            return None;
        }
    };
    let mut worker = Worker::new(ring, parts());
    if !tell(Ok(())) {
        return None;
    }
    // Dropped first: a panic ends the process before the worker unwinds, which would unmap memory that the kernel still
    // uses.
    let _guard = AbortOnPanic;
    worker.run()
}

/// Whether workers can run on each of these CPUs.
///
/// # Errors
///
/// [`EngineError::Affinity`] names a CPU that does not exist, or that this process may not use.
pub fn check_cpus(cpus: &[usize]) -> Result<(), EngineError> {
    thread::scope(|scope| {
        // A thread of its own, since the place of this one must not change.
        let thread = thread::Builder::new().spawn_scoped(scope, || cpus.iter().try_for_each(|&cpu| pin(cpu)));
        thread.map_err(EngineError::Thread)?.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

fn pin(cpu: usize) -> Result<(), EngineError> {
    if cpu >= CpuSet::MAX_CPU {
        return Err(EngineError::Affinity { cpu, error: io::Error::from_raw_os_error(nix::libc::EINVAL) });
    }
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None, &cpus).map_err(|errno| EngineError::Affinity { cpu, error: errno.into() })
}
