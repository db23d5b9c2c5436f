//! Guest RAM comes and goes while rings run: they hardly wait, reach it, and keep nothing of what has left.

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
        test("a_ring_hardly_waits_while_memory_comes_to_and_leaves_another_slot", needs(much()), || {
            latency::memory_comes_and_goes(4 * GIB)
        }),
        test("a_ring_hardly_waits_while_memory_comes_to_and_leaves_its_own_slot", needs(much()), || {
            latency::memory_comes_and_goes(GIB / 2)
        }),
        test(
            "a_queue_stops_soon_although_its_guest_is_being_pinned",
            needs(vec![Need::available_memory_bytes(6 * GIB)]),
            pinning::stop,
        ),
        test(
            "a_queue_stops_soon_although_a_region_that_came_is_being_pinned",
            needs(vec![Need::available_memory_bytes(9 * GIB)]),
            pinning::stop_behind_a_region,
        ),
        test(
            "memory_leaves_soon_although_the_guest_is_being_pinned_for_a_ring",
            needs(vec![Need::available_memory_bytes(6 * GIB)]),
            pinning::leave_before_a_ring,
        ),
        test(
            "memory_leaves_soon_although_a_region_that_came_is_being_pinned_and_the_ring_stays",
            needs(vec![Need::available_memory_bytes(9 * GIB)]),
            pinning::leave_behind_a_region,
        ),
        test("memory_that_has_left_is_let_go_though_rings_run_on", needs(vec![]), references::let_go),
        test(
            "pending_requests_are_answered_in_the_memory_that_the_guest_has_by_then",
            needs(vec![]),
            references::answers_move,
        ),
    ])
}
