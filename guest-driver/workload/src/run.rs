//! The three things that can be done with a job.

use crate::engine::{Engine, Plan};
use crate::slots::Slots;
use crate::{BlockQueue, Environment, Job, JobError, Report};

/// Stack that a run needs, in bytes, without what the queue and the environment need.
pub const STACK_BYTES: usize = 64 << 10;

const _: () = assert!(2 * size_of::<Slots>() <= STACK_BYTES);

/// Random reads and writes over the job's area, until its number of operations or its duration is reached, and until
/// everything in flight has completed.
///
/// `expected` has one entry per block: its [`checksum`](crate::checksum), or 0 where the content is unknown. While the job verifies and
/// reads, no entry may be 0 at the start; a block that becomes unknown on the way (its write failed) is written rather
/// than read when it is chosen again. The entry of a block whose write failed or was lost, or whose job does not
/// verify, is 0 afterwards.
///
/// After a lost request nothing more is submitted; what is in flight gets the job's `timeout_ns` once more. The
/// buffers of lost requests must not be used again: the device may still write to them.
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

/// Writes every block once, in order, at the job's depth. `operations`, `duration_ns` and `write_percent` do not count.
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

/// Reads every block once, in order, at the job's depth, and compares it if the job verifies: then no content may be
/// unknown. `operations`, `duration_ns` and `write_percent` do not count.
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
