//! The answers of a vCPU.

use ringpass_workload::Report;
use ringpass_workload::hostile::{HostileReport, Violation};

use crate::words::{Reader, Words, Writer};

/// Maximum number of bytes of the text with an answer.
pub const MESSAGE_BYTES: usize = 512;

/// The answer to a [`Command`](crate::Command). The host reads it from memory that the guest writes, so any words must
/// be valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The vCPU waits for its first command.
    Ready,
    /// The command is done, with this report.
    Done(Report),
    /// The hostile script is done, with this report.
    Attacked(HostileReport),
    /// The command is not possible. The text states the reason.
    Refused,
    /// The program has panicked. The text states where. The vCPU cannot continue.
    Panicked,
    /// An answer that the program never writes.
    Unknown(u64),
}

const READY: u64 = 1;
const DONE: u64 = 2;
const REFUSED: u64 = 3;
const PANICKED: u64 = 4;
const ATTACKED: u64 = 5;

impl Answer {
    /// Encodes the answer as words.
    pub fn to_words(&self) -> Words {
        let mut words = Writer::new();
        match self {
            Self::Ready => words.put(READY),
            Self::Refused => words.put(REFUSED),
            Self::Panicked => words.put(PANICKED),
            Self::Unknown(kind) => words.put(*kind),
            Self::Done(report) => {
                words.put(DONE);
                put_report(&mut words, report);
            }
            Self::Attacked(report) => {
                words.put(ATTACKED);
                put_hostile_report(&mut words, report);
            }
        }
        words.finish()
    }

    /// Decodes an answer.
    pub fn from_words(words: &Words) -> Self {
        let mut words = Reader(words.iter());
        match words.take() {
            READY => Self::Ready,
            DONE => Self::Done(take_report(&mut words)),
            ATTACKED => Self::Attacked(take_hostile_report(&mut words)),
            REFUSED => Self::Refused,
            PANICKED => Self::Panicked,
            kind => Self::Unknown(kind),
        }
    }
}

fn put_report(words: &mut Writer, report: &Report) {
    let Report {
        reads,
        writes,
        verified_bytes,
        mismatches,
        first_mismatch_block,
        first_mismatch_got,
        first_mismatch_expected,
        errors,
        first_error_result,
        unexpected,
        lost,
        late,
        missed_interrupts,
        elapsed_ns,
        doorbells,
        interrupts,
        sleeps,
        unmutes,
    } = *report;
    let values = [
        reads,
        writes,
        verified_bytes,
        mismatches,
        first_mismatch_block,
        first_mismatch_got,
        first_mismatch_expected,
        errors,
        first_error_result as u64,
        unexpected,
        lost,
        late,
        missed_interrupts,
        elapsed_ns,
        doorbells,
        interrupts,
        sleeps,
        unmutes,
    ];
    values.into_iter().for_each(|value| words.put(value));
}

fn take_report(words: &mut Reader<'_>) -> Report {
    Report {
        reads: words.take(),
        writes: words.take(),
        verified_bytes: words.take(),
        mismatches: words.take(),
        first_mismatch_block: words.take(),
        first_mismatch_got: words.take(),
        first_mismatch_expected: words.take(),
        errors: words.take(),
        first_error_result: words.take() as i64,
        unexpected: words.take(),
        lost: words.take(),
        late: words.take(),
        missed_interrupts: words.take(),
        elapsed_ns: words.take(),
        doorbells: words.take(),
        interrupts: words.take(),
        sleeps: words.take(),
        unmutes: words.take(),
    }
}

fn put_hostile_report(words: &mut Writer, report: &HostileReport) {
    let HostileReport { steps, refused, violations, lost, unexpected, first } = *report;
    [steps, refused, violations, lost, unexpected].into_iter().for_each(|value| words.put(value));
    for Violation { step, res } in first {
        words.put(step);
        words.put(res as u64);
    }
}

fn take_hostile_report(words: &mut Reader<'_>) -> HostileReport {
    HostileReport {
        steps: words.take(),
        refused: words.take(),
        violations: words.take(),
        lost: words.take(),
        unexpected: words.take(),
        first: core::array::from_fn(|_| Violation { step: words.take(), res: words.take() as i64 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_is_decoded_from_its_words() {
        let report = Report {
            reads: 1,
            writes: 2,
            verified_bytes: 3,
            mismatches: 4,
            first_mismatch_block: 5,
            first_mismatch_got: 6,
            first_mismatch_expected: 7,
            errors: 8,
            first_error_result: -9,
            unexpected: 10,
            lost: 11,
            late: 12,
            missed_interrupts: 13,
            elapsed_ns: 14,
            doorbells: 15,
            interrupts: 16,
            sleeps: 17,
            unmutes: 18,
        };
        let hostile = HostileReport {
            steps: 1,
            refused: 2,
            violations: 3,
            lost: 4,
            unexpected: 5,
            first: core::array::from_fn(|index| Violation { step: index as u64, res: -7 - index as i64 }),
        };
        let answers = [
            Answer::Ready,
            Answer::Done(report),
            Answer::Attacked(hostile),
            Answer::Refused,
            Answer::Panicked,
            Answer::Unknown(0x1234),
        ];
        for answer in answers {
            assert_eq!(Answer::from_words(&answer.to_words()), answer);
        }
    }
}
