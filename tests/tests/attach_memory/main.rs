//! The front-end adds and removes guest RAM while rings run. The rings hardly wait, reach the new memory, and keep
//! nothing of memory that has been removed.

use std::process::ExitCode;

use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    harness::{self, test},
    needs::Need,
};

mod latency;
mod pinning;
mod references;

const DISK_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u32 = 4096;
const GIB: u64 = 1 << 30;

fn main() -> ExitCode {
    let needs = |more: Vec<Need>| {
        let kind = DiskKind::Ext4PageCache.needs().into_iter();
        kind.chain(broker_process::needs()).chain(more).collect::<Vec<Need>>()
    };
    let much = || vec![Need::cpus(2), Need::available_memory_bytes(latency::REGION_BYTES + GIB / 2)];
    harness::run(vec![
        test("a_ring_hardly_waits_while_memory_is_added_to_and_removed_from_another_slot", needs(much()), || {
            latency::memory_comes_and_goes(4 * GIB)
        }),
        test("a_ring_hardly_waits_while_memory_is_added_to_and_removed_from_its_own_slot", needs(much()), || {
            latency::memory_comes_and_goes(GIB / 2)
        }),
        test(
            "a_queue_stops_soon_while_the_broker_pins_the_memory_of_its_guest",
            needs(vec![Need::available_memory_bytes(6 * GIB)]),
            pinning::stop,
        ),
        test(
            "a_queue_stops_soon_while_the_broker_pins_an_added_region",
            needs(vec![Need::available_memory_bytes(9 * GIB)]),
            pinning::stop_behind_a_region,
        ),
        test(
            "the_front_end_removes_memory_soon_while_the_broker_pins_for_a_first_ring",
            needs(vec![Need::available_memory_bytes(6 * GIB)]),
            pinning::leave_before_a_ring,
        ),
        test(
            "the_front_end_removes_memory_soon_while_the_broker_pins_an_added_region_and_the_ring_stays",
            needs(vec![Need::available_memory_bytes(9 * GIB)]),
            pinning::leave_behind_a_region,
        ),
        test("the_broker_frees_removed_memory_while_rings_run", needs(vec![]), references::let_go),
        test(
            "the_broker_answers_pending_requests_in_the_memory_that_the_guest_has_by_then",
            needs(vec![]),
            references::answers_move,
        ),
    ])
}
