//! Checks whether requests wait for other work of the broker, on a machine that may be busy.

use std::{fmt, time::Duration};

use anyhow::{Result, bail, ensure};

/// The least number of attempts, which also shows work that delays requests only sometimes.
const ATTEMPTS_MIN: u32 = 3;
/// The least number of attempts after one in which a request waited for the work. A machine without a free CPU can
/// cause that once.
const ATTEMPTS_AFTER_A_WAIT_MIN: u32 = 6;
/// The most attempts.
const ATTEMPTS_MAX: u32 = 10;

/// The latencies of one attempt.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    /// The longest request without the work. A busy machine delays these requests too.
    pub worst_without: Duration,
    /// The longest request during the work.
    pub worst_during: Duration,
    /// The duration of the work.
    pub work: Duration,
}

impl Waits {
    /// No request was delayed.
    fn is_undisturbed(&self, limit: Duration) -> bool {
        self.worst_during < limit.max(2 * self.worst_without)
    }

    /// A request waited for the work: even a busy machine rarely delays a request that long.
    fn is_held_up(&self, limit: Duration) -> bool {
        !self.is_undisturbed(limit) && self.worst_during > self.work / 2
    }
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { worst_without, worst_during, work } = self;
        write!(f, "longest request {worst_during:?} beside work of {work:?}, {worst_without:?} without it")
    }
}

/// Makes attempts, each of which does the work while requests run. A request may wait for the work in at most one
/// attempt. In one attempt, no request may take longer than `limit` (or twice as long as without the work); not in all
/// attempts, because a request that waits for a CPU takes long too.
///
/// # Errors
///
/// An attempt fails, or requests take longer.
pub fn hardly_wait(limit: Duration, mut attempt: impl FnMut() -> Result<Waits>) -> Result<()> {
    let (mut is_undisturbed, mut held_up, mut seen) = (false, 0, Vec::new());
    for number in 1..=ATTEMPTS_MAX {
        let waits = attempt()?;
        eprintln!("attempt {number}: {waits}");
        held_up += u32::from(waits.is_held_up(limit));
        ensure!(held_up <= 1, "attempt {number}: a request waited for the work, again: {waits}");
        is_undisturbed |= waits.is_undisturbed(limit);
        let attempts_min = if held_up == 0 { ATTEMPTS_MIN } else { ATTEMPTS_AFTER_A_WAIT_MIN };
        if number >= attempts_min && is_undisturbed {
            return Ok(());
        }
        seen.push(waits.to_string());
    }
    bail!("requests take {limit:?} and longer in each attempt: {}", seen.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(10);

    fn run(worst_ms: &[u64]) -> Result<usize> {
        let mut attempts = worst_ms.iter().cycle();
        let mut made = 0;
        hardly_wait(LIMIT, || {
            made += 1;
            let worst_during = Duration::from_millis(*attempts.next().expect("it goes on"));
            let (worst_without, work) = (Duration::from_millis(2), Duration::from_millis(100));
            Ok(Waits { worst_without, worst_during, work })
        })?;
        Ok(made)
    }

    #[test]
    fn hardly_wait_tries_a_busy_machine_again_and_finds_requests_that_wait_for_the_work() {
        assert_eq!(run(&[3]).unwrap(), 3);
        assert_eq!(run(&[20, 20, 20, 20, 3]).unwrap(), 5);
        assert!(run(&[20]).unwrap_err().to_string().starts_with("requests take 10ms and longer in each attempt"));
        assert_eq!(run(&[3, 90, 3, 3, 3, 3]).unwrap(), 6);
        let error = run(&[3, 90]).unwrap_err().to_string();
        assert!(error.contains("attempt 4: a request waited for the work, again: longest request 90ms"), "{error}");
    }
}
