//! Hostile drivers with rings: their requests for rings, their SQEs, and their writes to shared memory.

use std::process::ExitCode;

use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    harness::{self, test},
    needs::Need,
};

mod entries;
mod guest;
mod neighbour;
mod refusals;
mod scribbles;

fn main() -> ExitCode {
    let needs = || {
        let kind = DiskKind::Ext4PageCache.needs().into_iter();
        kind.chain(broker_process::needs()).chain([Need::cpus(2)]).collect::<Vec<Need>>()
    };
    harness::run(vec![
        test(
            "the_broker_refuses_a_bad_geometry_names_the_field_and_serves_a_virtqueue",
            needs(),
            refusals::bad_geometry,
        ),
        test("queues_stay_virtqueues_while_memory_cannot_be_pinned", needs(), refusals::other_kinds_of_memory),
        test("the_kernel_refuses_entries_that_are_not_fixed_reads_and_writes_of_the_disk", needs(), entries::forbidden),
        test("a_guest_that_scribbles_everywhere_harms_only_itself_by_sq_thread", needs(), || {
            scribbles::run("sq-thread")
        }),
        test("a_guest_that_scribbles_everywhere_harms_only_itself_by_doorbell", needs(), || scribbles::run("doorbell")),
    ])
}
