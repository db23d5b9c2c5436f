//! The three ways to run a job.

use crate::engine::{Engine, Plan};
use crate::slots::Slots;
use crate::{BlockQueue, Environment, Job, JobError, Report};

/// Stack size in bytes that a run needs, without the needs of the queue and the environment.
pub const STACK_BYTES: usize = 64 << 10;

const _: () = assert!(2 * size_of::<Slots>() <= STACK_BYTES);

/// Random reads and writes over the job's area, until the job's number of operations or its duration is reached, and
/// until all requests in flight have completed.
///
/// `expected` has one entry for each block: its [`checksum`](crate::checksum), or 0 if the content is unknown. If the
/// job verifies and reads, no entry may be 0 at the start. If a write fails during the run, its block becomes unknown,
/// and the workload writes the block instead of reading it when it chooses the block again. Afterwards the entry of a
/// block is 0 if its write failed or was lost, or if the job does not verify and has written the block.
///
/// After a lost request the workload submits no more requests, and waits for those in flight for the job's `timeout_ns`
/// once more. Do not reuse the buffers of lost requests: the device may still write to them.
pub fn run<Q: BlockQueue, E: Environment>(
    job: &Job,
    queue: &mut Q,
    env: &mut E,
    expected: &mut [u64],
) -> Result<Report, JobError> {
    job.check()?;
    job.check_end()?;
    job.check_expected(expected, job.write_percent < 100)?;
    Engine::new(job, Plan::Random, queue, env, expected, &mut Slots::new(job.depth))?.drive()
}

/// Writes every block once, in order, at the job's depth. Ignores `operations`, `duration_ns` and `write_percent`.
pub fn prefill<Q: BlockQueue, E: Environment>(
    job: &Job,
    queue: &mut Q,
    env: &mut E,
    expected: &mut [u64],
) -> Result<Report, JobError> {
    job.check()?;
    job.check_expected(expected, false)?;
    Engine::new(job, Plan::EveryBlock { write: true }, queue, env, expected, &mut Slots::new(job.depth))?.drive()
}

/// Reads every block once, in order, at the job's depth, and compares it if the job verifies (then no content may be
/// unknown). Ignores `operations`, `duration_ns` and `write_percent`.
pub fn verify_all<Q: BlockQueue, E: Environment>(
    job: &Job,
    queue: &mut Q,
    env: &mut E,
    expected: &mut [u64],
) -> Result<Report, JobError> {
    job.check()?;
    job.check_expected(expected, true)?;
    Engine::new(job, Plan::EveryBlock { write: false }, queue, env, expected, &mut Slots::new(job.depth))?.drive()
}
