//! Descriptor chains of a hostile driver. Each gets the status that VIRTIO demands, or stops its own queue and no
//! other. The device writes only where the chain allows it.

use std::process::ExitCode;

use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    harness::{self, Test, test},
};

use bench::with_bench;

mod bench;
mod random;
mod statuses;
mod stops;

fn main() -> ExitCode {
    let needs = || DiskKind::Ext4Direct.needs().into_iter().chain(broker_process::needs());
    let tests: Vec<Test> = vec![
        test("the_device_answers_malformed_requests_with_the_status_of_the_specification", needs(), || {
            with_bench(statuses::every_kind)
        }),
        test("a_flood_of_one_error_does_not_hide_another_in_the_log", needs(), statuses::flood),
        test("a_chain_that_the_device_cannot_answer_stops_its_queue_and_no_other", needs(), || {
            with_bench(stops::every_kind)
        }),
        test("the_device_answers_random_chains_or_stops_their_queue_and_writes_nowhere_else", needs(), || {
            with_bench(random::chains)
        }),
    ];
    harness::run(tests)
}
