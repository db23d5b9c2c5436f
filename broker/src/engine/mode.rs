//! The operator's mode of a device at run time: queues leave their rings with their drivers' help, and may have rings again.

use std::time::{Duration, Instant};

use thiserror::Error;

use super::attach::OperatorMode;
use super::command::Command;
use super::control::EngineControl;

/// How much longer than the workers' deadline a change of mode waits for their answers: a worker may be in a system call.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);

/// Why the mode of a device did not change.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ModeError {
    /// The device was started without rings.
    #[error("the device offers no rings, so its mode cannot change")]
    NoRings,
    /// Drivers did not leave their rings in time. The mode is what it was.
    #[error(
        "{} did not leave the ring within {} ms: the guest's driver has not answered the drain; the mode stays as it was, and \
         the ring runs on",
        queues_of(.queues),
        .timeout.as_millis()
    )]
    NotDrained {
        /// Indexes of the queues that are still attached.
        queues: Vec<u16>,
        /// How long the engine waited.
        timeout: Duration,
    },
}

fn queues_of(queues: &[u16]) -> String {
    let numbers: Vec<_> = queues.iter().map(u16::to_string).collect();
    match &numbers[..] {
        [one] => format!("queue {one}"),
        several => format!("queues {}", several.join(", ")),
    }
}

impl EngineControl {
    /// Changes the operator's mode, and waits until it is in force.
    ///
    /// [`OperatorMode::Virtqueue`]: the engine gives out no more rings and asks the drivers to leave those that they have; requests on
    /// them end before that, and none is lost. This returns when all queues are virtqueues. If a driver does not leave its ring within
    /// `timeout`, the former mode is in force again: queues that have left their rings already may have new ones.
    /// (`docs/abi.md`, section 6: a drain cannot be taken back. A driver that answers later gets another ring.)
    ///
    /// [`OperatorMode::Auto`]: drivers may ask for rings again, and are told so. This does not wait until they have. Queues whose last
    /// ring cost too much need not wait any longer.
    ///
    /// One change at a time: the caller must not begin another before this returns.
    ///
    /// # Errors
    ///
    /// Each kind of [`ModeError`].
    pub fn set_operator_mode(&self, mode: OperatorMode, timeout: Duration) -> Result<(), ModeError> {
        let attach = self.attach.as_ref().ok_or(ModeError::NoRings)?;
        let former = attach.rings.availability.operator_mode();
        self.allow(mode);
        if mode == OperatorMode::Auto {
            return Ok(());
        }
        let deadline = Instant::now() + timeout;
        let answers = self.begin_order(|reply| Command::DrainRings { deadline, reply });
        let end = deadline + ANSWER_PATIENCE;
        // A worker that has ended has no rings.
        let queues = answers.iter().filter_map(|answer| answer.next_while(|| Instant::now() < end)).flatten();
        let mut queues: Vec<u16> = queues.collect();
        if queues.is_empty() {
            return Ok(());
        }
        queues.sort_unstable();
        self.allow(former);
        Err(ModeError::NotDrained { queues, timeout })
    }

    fn allow(&self, mode: OperatorMode) {
        let Some(attach) = &self.attach else { return };
        let kinds = attach.rings.availability.set_operator_mode(mode);
        let resumed = if mode == OperatorMode::Auto { attach.rings.pauses.take_all() } else { Vec::new() };
        resumed.iter().for_each(|&queue| attach.rings.metrics.clear_refused(queue));
        if !kinds.is_empty() || !resumed.is_empty() {
            attach.workers().tell_driver();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_names_the_queues_and_the_time() {
        let timeout = Duration::from_secs(2);
        let error = |queues| ModeError::NotDrained { queues, timeout }.to_string();
        assert!(error(vec![3]).starts_with("queue 3 did not leave the ring within 2000 ms"), "{}", error(vec![3]));
        assert!(error(vec![0, 2]).starts_with("queues 0, 2 did not"), "{}", error(vec![0, 2]));
    }
}
