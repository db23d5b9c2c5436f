//! The workload on a device in memory: it does what the job demands, and reports every fault of the device.

mod device;
mod faults;
mod properties;
mod refused_jobs;

use ringpass_workload::{Job, Report, STACK_BYTES, Verify, Wait, checksum, prefill, run};

use self::device::{Device, disk_bytes, job};

/// Prefills, lets `prepare` touch the device, runs, and returns the device and the run's report.
fn run_after_prefill(job: &Job, prepare: impl FnOnce(&Device)) -> (Device, Vec<u64>, Report) {
    let device = Device::new(disk_bytes(job));
    let (mut queue, mut env) = device.handles();
    let mut expected = vec![0; job.blocks() as usize];
    let filled = prefill(job, &mut queue, &mut env, &mut expected).unwrap();
    assert!(filled.is_clean(), "{filled}");
    assert_eq!(filled.writes, job.blocks());
    prepare(&device);
    let report = run(job, &mut queue, &mut env, &mut expected).unwrap();
    (device, expected, report)
}

#[test]
fn every_request_is_done_and_every_read_byte_verified() {
    let (device, expected, report) = run_after_prefill(&job(), |_| ());
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.operations(), 1000);
    assert!(report.reads > 350 && report.writes > 350, "{report}");
    assert_eq!(report.verified_bytes, report.reads * 4096);
    assert_eq!(device.overlaps(), 0);
    assert_eq!(device.depth_seen(), 8);
    assert_eq!(device.in_flight(), 0);
    for (block, &entry) in expected.iter().enumerate() {
        assert_eq!(entry, checksum(&device.disk_block(&job(), block)), "block {block}");
    }
}

#[test]
fn a_second_prefill_with_the_same_seed_writes_other_content() {
    let device = Device::new(disk_bytes(&job()));
    let (mut queue, mut env) = device.handles();
    let mut expected = vec![0; 64];
    prefill(&job(), &mut queue, &mut env, &mut expected).unwrap();
    let first = expected.clone();
    prefill(&job(), &mut queue, &mut env, &mut expected).unwrap();
    assert!(first.iter().zip(&expected).all(|(old, new)| old != new));
}

#[test]
fn random_muting_loses_no_completion() {
    let job = Job { wait: Wait::InterruptMuting, operations: 50_000, ..job() };
    let (_, _, report) = run_after_prefill(&job, |_| ());
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.operations(), 50_000);
    assert!(report.unmutes > 1000 && report.interrupts > 1000, "{report:?}");
}

#[test]
fn the_doorbell_wakes_up_a_sleeping_device() {
    let job = Job { depth: 1, pause_ns: 10_000, ..job() };
    let (_, _, report) = run_after_prefill(&job, Device::set_doorbell_needed);
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.doorbells, 1000);
    assert!(report.elapsed_ns >= 999 * 10_000);
}

#[test]
fn the_workload_waits_for_room_in_a_queue_smaller_than_the_depth() {
    for wait in [Wait::Poll, Wait::Interrupt] {
        let job = Job { depth: 32, buffer_stride_bytes: 4096, wait, ..job() };
        let (device, _, report) = run_after_prefill(&job, |device| device.set_queue_entries(4));
        assert!(report.is_clean(), "{report}");
        assert_eq!(report.operations(), 1000);
        assert_eq!(device.overlaps(), 0);
    }
}

#[test]
fn the_workload_does_not_sleep_for_room_without_requests_in_flight() {
    let job = Job { depth: 1, wait: Wait::Interrupt, ..job() };
    let (_, _, report) = run_after_prefill(&job, Device::set_late_room);
    assert!(report.is_clean(), "{report}");
    assert_eq!((report.operations(), report.sleeps - report.interrupts), (1000, 0));
}

#[test]
fn the_share_of_durable_writes_matches_the_job() {
    let (device, _, report) = run_after_prefill(&Job { durable_percent: 100, ..job() }, |_| ());
    assert_eq!(device.durable_writes(), report.writes + 64);
    let (device, _, _) = run_after_prefill(&job(), |_| ());
    assert_eq!(device.durable_writes(), 0);
}

#[test]
fn the_time_limit_ends_a_run() {
    let job = Job { operations: 0, duration_ns: 10_000_000, ..job() };
    let (device, _, report) = run_after_prefill(&job, |_| ());
    assert!(report.is_clean());
    assert!((10_000_000..11_000_000).contains(&report.elapsed_ns), "{}", report.elapsed_ns);
    assert_eq!(device.in_flight(), 0);
}

#[test]
fn latency_counts_from_publication_to_reap_only() {
    let device = Device::new(disk_bytes(&job()));
    let (mut queue, mut env) = device.handles();
    let mut expected = vec![0; 64];
    let job = Job { depth: 1, ..job() };
    prefill(&job, &mut queue, &mut env, &mut expected).unwrap();
    // At depth 1 the device answers at the first look: one step of 100 ns and one reading of the clock.
    assert_eq!(env.latencies_ns, vec![120; 64]);
}

#[test]
fn without_verification_contents_become_unknown_and_nothing_is_compared() {
    let job = Job { verify: Verify::Off, write_percent: 100, ..job() };
    let (_, expected, report) = run_after_prefill(&job, |_| ());
    assert_eq!((report.verified_bytes, report.writes), (0, 1000));
    assert_eq!(expected, vec![0; 64]);
}

#[test]
fn a_run_fits_into_stack_bytes() {
    let work = || run_after_prefill(&job(), |_| ()).2.is_clean();
    // The stack frames of the test and of the device need some more.
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES + (16 << 10)).spawn(work).unwrap();
    assert!(thread.join().unwrap());
}

#[test]
fn reports_of_several_queues_add_up() {
    let first = Report { reads: 1, elapsed_ns: 5, ..Report::default() };
    let second = Report { reads: 2, elapsed_ns: 3, errors: 1, first_error_result: -5, ..Report::default() };
    let mut sum = first;
    sum.merge(&second);
    assert_eq!(sum, Report { reads: 3, elapsed_ns: 5, errors: 1, first_error_result: -5, ..Report::default() });
}
