//! Runs a script on a ring.

use ringpass_guest_abi::{DriverRing, RingMemory, Sqe};

use super::{Step, Target, TargetError, script};
use crate::Environment;

/// Maximum number of violations that a report names; it only counts further ones.
pub const VIOLATIONS_KEPT: usize = 8;

/// After this number of steps without an answer the runner stops.
const LOST_MAX: u64 = 3;

/// A step with an answer that is not permitted.
///
/// The structure has plain integers, like [`Report`](crate::Report). [`HostileReport::named`] gives the name of the
/// step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Violation {
    /// The step, counted from 0.
    pub step: u64,
    /// The CQE's result; [`Violation::NO_ANSWER`] if none came in time.
    pub res: i64,
}

impl Violation {
    /// [`Violation::res`] of a step without a completion.
    pub const NO_ANSWER: i64 = i64::MIN;
}

/// The outcome of a script.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct HostileReport {
    /// Number of steps that were tried.
    pub steps: u64,
    /// Number of steps that ended with an error.
    pub refused: u64,
    /// Number of steps with an answer that is not permitted, or without an answer.
    pub violations: u64,
    /// Number of steps without a completion within the time-out.
    pub lost: u64,
    /// Number of completions that belong to no step, or to a step that was given up.
    pub unexpected: u64,
    /// The first violations.
    pub first: [Violation; VIOLATIONS_KEPT],
}

impl HostileReport {
    /// Whether at least one step was tried, and every answer was permitted.
    pub fn is_clean(&self) -> bool {
        self.steps != 0 && self.violations == 0 && self.unexpected == 0
    }

    /// The first violations with their steps, if the script was the one for `target`.
    pub fn named<'a>(
        &'a self,
        target: &'a Target<'a>,
    ) -> Result<impl Iterator<Item = (Step, Violation)> + use<'a>, TargetError> {
        target.check()?;
        let kept = self.violations.min(VIOLATIONS_KEPT as u64) as usize;
        Ok(self.first[..kept].iter().filter_map(move |violation| {
            let step = script(target).ok()?.nth(usize::try_from(violation.step).ok()?)?;
            Some((step, *violation))
        }))
    }

    fn violate(&mut self, step: u64, res: i64) {
        if let Some(slot) = usize::try_from(self.violations).ok().and_then(|index| self.first.get_mut(index)) {
            *slot = Violation { step, res };
        }
        self.violations += 1;
    }
}

/// Submits the steps one at a time, polls for their completions, and compares the results. The time-out of a step is
/// `timeout_ns`.
///
/// No other request may be in flight on the ring. Interrupts stay muted.
pub fn run_hostile<M: RingMemory, E: Environment>(
    ring: &mut DriverRing<M>,
    env: &mut E,
    steps: impl Iterator<Item = Step>,
    timeout_ns: u64,
) -> HostileReport {
    ring.mute_interrupts();
    let mut report = HostileReport::default();
    for (index, step) in (0u64..).zip(steps) {
        if report.lost >= LOST_MAX {
            break;
        }
        report.steps += 1;
        match answer(ring, env, &Sqe { user_data: index, ..step.sqe }, timeout_ns, &mut report.unexpected) {
            Some(res) => {
                report.refused += u64::from(res < 0);
                if !step.expect.allows(res) {
                    report.violate(index, i64::from(res));
                }
            }
            None => {
                report.lost += 1;
                report.violate(index, Violation::NO_ANSWER);
            }
        }
    }
    report
}

/// The result of one request. `None`: no completion came in time.
fn answer<M: RingMemory, E: Environment>(
    ring: &mut DriverRing<M>,
    env: &mut E,
    sqe: &Sqe,
    timeout_ns: u64,
    unexpected: &mut u64,
) -> Option<i32> {
    let start_ns = env.now_ns();
    let mut empty_polls = 0u32;
    let mut pushed = false;
    while env.now_ns().saturating_sub(start_ns) < timeout_ns {
        // The head of the submission queue may move after the completion of the previous step.
        if !pushed && ring.push(sqe).is_ok() {
            pushed = true;
            if ring.publish() {
                env.ring_doorbell();
            }
        }
        match ring.reap() {
            Some(cqe) if cqe.user_data == sqe.user_data => return Some(cqe.res),
            Some(_) => *unexpected += 1,
            None => {
                empty_polls = empty_polls.saturating_add(1);
                env.relax(empty_polls);
            }
        }
    }
    None
}
