//! Descriptor chains of a hostile driver: each gets the status that VIRTIO says, or stops its own queue and no other, and
//! the device writes nowhere but where the chain lets it.

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
        test("malformed_requests_get_the_status_of_the_specification", needs(), || with_bench(statuses::every_kind)),
        test("a_flood_of_one_error_does_not_hide_another_in_the_log", needs(), statuses::flood),
        test("chains_that_cannot_be_answered_stop_their_queue_and_no_other", needs(), || with_bench(stops::every_kind)),
        test("random_chains_are_answered_or_stop_their_queue_and_write_nowhere_else", needs(), || {
            with_bench(random::chains)
        }),
    ];
    harness::run(tests)
}
