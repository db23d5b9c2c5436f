//! Drivers that ask for rings and mean harm: what they ask for, what they submit, and what they scribble.

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
            "attachments_with_a_bad_geometry_are_refused_by_field_and_leave_a_virtqueue",
            needs(),
            refusals::bad_geometry,
        ),
        test("memory_that_cannot_be_pinned_leaves_virtqueues", needs(), refusals::other_kinds_of_memory),
        test("entries_that_are_not_fixed_reads_and_writes_of_the_disk_are_refused", needs(), entries::forbidden),
        test("completions_that_are_never_reaped_go_with_their_ring_by_sq_thread", needs(), || {
            entries::never_reaped("sq-thread")
        }),
        test("completions_that_are_never_reaped_go_with_their_ring_by_doorbell", needs(), || {
            entries::never_reaped("doorbell")
        }),
        test("a_guest_that_scribbles_everywhere_harms_itself_only_by_sq_thread", needs(), || {
            scribbles::run("sq-thread")
        }),
        test("a_guest_that_scribbles_everywhere_harms_itself_only_by_doorbell", needs(), || scribbles::run("doorbell")),
    ])
}
