//! Whether requests wait for something that goes on beside them, on a machine that may be busy with other things.

use std::{fmt, time::Duration};

use anyhow::{Result, bail, ensure};

/// So many attempts are made at least: what holds requests up only now and then is seen, too.
const ATTEMPTS_MIN: u32 = 3;
/// So many at least, after an attempt in which a request waited for the work: a machine without a free processor can do that once.
const ATTEMPTS_AFTER_A_WAIT_MIN: u32 = 6;
/// And so many at most.
const ATTEMPTS_MAX: u32 = 10;

/// What the requests of one attempt took.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    /// The longest request without the work. What a busy machine does, it does without the work too.
    pub worst_without: Duration,
    /// The longest request while the work went on.
    pub worst_during: Duration,
    /// How long the work took.
    pub work: Duration,
}

impl Waits {
    /// Nothing held a request up.
    fn is_undisturbed(&self, limit: Duration) -> bool {
        self.worst_during < limit.max(2 * self.worst_without)
    }

    /// A request waited for the work: even a busy machine hardly makes it that long.
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

/// Makes attempts, each of which does the work while requests run. A request may wait for the work in at most one attempt.
/// In one attempt, no request may take longer than `limit` (or twice as long as without the work); not in all, because a
/// request that waits for a processor takes long, too.
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
    fn a_busy_machine_is_tried_again_and_requests_that_wait_for_the_work_are_found() {
        assert_eq!(run(&[3]).unwrap(), 3);
        assert_eq!(run(&[20, 20, 20, 20, 3]).unwrap(), 5);
        assert!(run(&[20]).unwrap_err().to_string().starts_with("requests take 10ms and longer in each attempt"));
        assert_eq!(run(&[3, 90, 3, 3, 3, 3]).unwrap(), 6);
        let error = run(&[3, 90]).unwrap_err().to_string();
        assert!(error.contains("attempt 4: a request waited for the work, again: longest request 90ms"), "{error}");
    }
}
