//! Attacks on what a guest may cost its host: CPU time, kernel memory, and the time that a stop takes.
//!
//! The guest has a ring, and floods it with requests that are as long, as many or as slow as it can make them. The host
//! must stay usable for others, and must get everything back in time.

use std::process::ExitCode;

use ringpass_tests::{
    broker_process,
    harness::{self, test},
    needs::Need,
};

mod attack;
mod excess;
mod host;
mod neighbour;
mod stops;

use attack::Attack;

fn main() -> ExitCode {
    let mut tests = Vec::new();
    for submission in ["sq-thread", "doorbell"] {
        let how = submission.replace('-', "_");
        tests.push(test(
            format!("a_guest_that_never_reaps_loses_its_ring_and_works_on_by_{how}"),
            needs(Attack::SMALL_READS),
            move || excess::loses_its_ring(submission),
        ));
    }
    tests.push(test("a_guest_that_lies_about_its_indexes_loses_its_ring", needs(Attack::SMALL_READS), excess::liar));
    for attack in Attack::ALL {
        tests.push(test(format!("a_stop_takes_at_most_a_second_beside_{attack}"), needs(attack), move || {
            stops::bounded(attack)
        }));
    }
    for attack in [Attack::READS_OF_HOLES, Attack::WRITES_INTO_HOLES] {
        tests.push(test(format!("a_neighbour_keeps_its_latency_beside_{attack}"), needs(attack), move || {
            neighbour::keeps_its_latency(attack)
        }));
    }
    harness::run(tests)
}

fn needs(attack: Attack) -> Vec<Need> {
    let needs = attack.disk.needs().into_iter().chain(broker_process::needs());
    needs.chain([Need::cpus(2), Need::available_memory_bytes(1 << 30)]).collect()
}
