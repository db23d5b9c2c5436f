//! The workload on a device in memory: it does what the job demands, and reports every fault of the device.

mod support;

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use ringpass_workload::{Job, JobError, Report, STACK_BYTES, Verify, Wait, checksum, prefill, run, verify_all};
use support::{BUFFERS_GPA, Device, Fault, disk_bytes, job};

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

fn report_with(job: &Job, fault: Fault) -> Report {
    run_after_prefill(job, |device| device.inject(500, fault)).2
}

fn reads_only() -> Job {
    Job { write_percent: 0, ..job() }
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
fn a_flipped_bit_anywhere_is_a_mismatch_of_the_right_block() {
    for byte in [0, 7, 511, 2048, 4095] {
        let report = report_with(&reads_only(), Fault::FlippedBit { byte });
        assert_eq!((report.mismatches, report.errors), (1, 0), "byte {byte}: {report}");
        assert!(report.first_mismatch_block < 64);
        assert_ne!(report.first_mismatch_got, report.first_mismatch_expected);
    }
}

#[test]
fn the_wrong_block_is_a_mismatch() {
    assert_eq!(report_with(&reads_only(), Fault::WrongBlock).mismatches, 1);
}

#[test]
fn missing_data_is_a_mismatch_even_if_the_buffer_held_the_same_data_before() {
    // One block and one buffer: the buffer always holds the right content from the previous read.
    let job = Job { area_bytes: 4096, depth: 1, ..reads_only() };
    assert_eq!(report_with(&job, Fault::MissingSector).mismatches, 1);
}

#[test]
fn a_write_that_did_not_reach_the_disk_leads_to_a_mismatch() {
    let job = Job { operations: 501, write_percent: 100, ..job() };
    let device = Device::new(disk_bytes(&job));
    let (mut queue, mut env) = device.handles();
    let mut expected = vec![0; 64];
    device.inject(500, Fault::LostWrite);
    assert!(run(&job, &mut queue, &mut env, &mut expected).unwrap().is_clean());
    // The blocks that the run did not write.
    for (block, entry) in expected.iter_mut().enumerate().filter(|(_, entry)| **entry == 0) {
        *entry = checksum(&device.disk_block(&job, block));
    }
    let report = verify_all(&job, &mut queue, &mut env, &mut expected).unwrap();
    assert_eq!((report.reads, report.mismatches), (64, 1), "{report}");
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
fn verify_all_finds_damage_on_the_disk() {
    let (device, mut expected, report) = run_after_prefill(&job(), |_| ());
    assert!(report.is_clean());
    device.flip_disk_byte(8192 + 17 * 4096 + 4095);
    let (mut queue, mut env) = device.handles();
    let report = verify_all(&job(), &mut queue, &mut env, &mut expected).unwrap();
    assert_eq!((report.reads, report.writes, report.verified_bytes), (64, 0, 64 * 4096));
    assert_eq!((report.mismatches, report.first_mismatch_block), (1, 17));
    assert!(report.to_string().contains("1 reads had wrong content, first block 17"), "{report}");
}

#[test]
fn a_short_transfer_is_an_error_with_its_length() {
    let report = report_with(&job(), Fault::Short);
    assert_eq!((report.errors, report.first_error_result, report.operations()), (1, 2048, 999));
}

#[test]
fn a_failed_request_is_an_error_with_its_errno_and_the_run_continues() {
    let report = report_with(&reads_only(), Fault::Error { res: -5 });
    assert_eq!((report.errors, report.first_error_result, report.reads), (1, -5, 999));
    assert!(report.to_string().contains("first result -5"), "{report}");
}

#[test]
fn a_failed_write_does_not_lead_to_a_mismatch() {
    for at in 0..20 {
        let fault = Fault::Error { res: -5 };
        let (_, _, report) = run_after_prefill(&job(), |device| device.inject(at, fault));
        assert_eq!((report.errors, report.operations(), report.mismatches), (1, 999, 0), "{report}");
    }
}

#[test]
fn only_successful_requests_count_for_latency() {
    for fault in [Fault::Short, Fault::Error { res: -5 }, Fault::Late { after_ns: 1_500_000 }] {
        let device = Device::new(disk_bytes(&job()));
        let (mut queue, mut env) = device.handles();
        let mut expected = vec![0; 64];
        device.inject(10, fault);
        let report = prefill(&job(), &mut queue, &mut env, &mut expected).unwrap();
        assert_eq!(env.latencies_ns.len() as u64, report.operations() - report.late, "{fault:?}");
        assert!(env.latencies_ns.iter().all(|&latency_ns| latency_ns < 1_000_000));
    }
}

#[test]
fn after_a_failed_write_a_block_is_unknown_and_written_before_it_is_read() {
    let job = Job { write_percent: 100, operations: 501, ..job() };
    let (device, mut expected, report) = run_after_prefill(&job, |device| device.inject(500, Fault::Error { res: -5 }));
    assert_eq!((report.errors, expected.iter().filter(|&&entry| entry == 0).count()), (1, 1));
    let (mut queue, mut env) = device.handles();
    let unknown = expected.iter().position(|&entry| entry == 0).unwrap() as u64;
    let error = verify_all(&job, &mut queue, &mut env, &mut expected).unwrap_err();
    assert_eq!(error, JobError::UnknownContent { block: unknown });
    assert!(error.to_string().contains("prefill first"));
}

#[test]
fn a_lost_completion_ends_the_run_and_is_counted() {
    for wait in [Wait::Poll, Wait::Interrupt, Wait::InterruptMuting] {
        let job = Job { wait, operations: 0, duration_ns: 1_000_000_000, ..job() };
        let report = report_with(&job, Fault::Lost);
        assert_eq!((report.lost, report.late, report.errors, report.unexpected), (1, 0, 0, 0), "{wait:?} {report}");
        assert!(report.elapsed_ns < 5_000_000, "{wait:?} ran on for {} ns", report.elapsed_ns);
        assert!(report.to_string().contains("1 requests got no completion in time"), "{report}");
    }
}

#[test]
fn the_block_of_a_lost_write_is_unknown_and_no_mark_stays_in_the_table() {
    let job = Job { write_percent: 100, ..job() };
    let (_, expected, report) = run_after_prefill(&job, |device| device.inject(500, Fault::Lost));
    assert_eq!(report.lost, 1);
    assert_eq!(expected.iter().filter(|&&entry| entry == 0).count(), 1);
    assert!(expected.iter().all(|entry| entry >> 63 == 0));
}

#[test]
fn a_completion_after_its_time_is_lost_and_late() {
    for wait in [Wait::Poll, Wait::Interrupt] {
        let job = Job { wait, ..job() };
        let report = report_with(&job, Fault::Late { after_ns: 1_500_000 });
        assert_eq!((report.lost, report.late, report.unexpected), (1, 1, 0), "{wait:?} {report}");
    }
}

#[test]
fn a_completion_within_its_time_is_neither_lost_nor_late() {
    let report = report_with(&job(), Fault::Late { after_ns: 500_000 });
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.operations(), 1000);
}

#[test]
fn a_doubled_completion_is_unexpected_and_counts_once() {
    let report = report_with(&job(), Fault::Doubled);
    assert_eq!((report.unexpected, report.operations(), report.lost), (1, 1000, 0), "{report}");
}

#[test]
fn a_completion_of_no_request_is_unexpected() {
    for user_data in [0, 3, 0xffff, 511, u64::MAX, 9 << 16] {
        let report = report_with(&job(), Fault::MadeUp { user_data });
        assert_eq!((report.unexpected, report.operations()), (1, 1000), "{user_data:#x}: {report}");
    }
}

#[test]
fn a_completion_without_its_interrupt_is_counted() {
    let job = Job { wait: Wait::Interrupt, depth: 1, ..job() };
    let report = report_with(&job, Fault::NoInterrupt);
    assert_eq!((report.missed_interrupts, report.operations()), (1, 1000), "{report}");
    assert!(report.sleeps > report.interrupts);
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
fn a_queue_that_never_has_room_is_reported() {
    let job = Job { write_percent: 100, ..job() };
    let (_, expected, report) = run_after_prefill(&job, |device| device.set_queue_entries(0));
    assert_eq!((report.operations(), report.lost), (0, 1), "{report}");
    assert!(expected.iter().all(|&entry| entry != 0 && entry >> 63 == 0));
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
fn the_error_names_a_field_of_a_job_that_is_out_of_range() {
    let good = job();
    let cases = [
        (Job { block_bytes: 0, ..good }, "block_bytes is 0"),
        (Job { block_bytes: 1000, ..good }, "block_bytes is 1000"),
        (Job { depth: 0, ..good }, "depth is 0"),
        (Job { depth: 513, ..good }, "depth is 513"),
        (Job { write_percent: 101, ..good }, "write_percent is 101"),
        (Job { durable_percent: 101, ..good }, "durable_percent is 101"),
        (Job { timeout_ns: 0, ..good }, "timeout_ns is 0"),
        (Job { area_offset_bytes: 1, ..good }, "area_offset_bytes is 1"),
        (Job { area_offset_bytes: !511, ..good }, "area_offset_bytes"),
        (Job { area_bytes: 4097, ..good }, "area_bytes is 4097"),
        (Job { area_bytes: 7 * 4096, ..good }, "has 7 blocks"),
        (Job { area_bytes: 1 << 45, ..good }, "fewer than 2^32"),
        (Job { buffers_gpa: 8, ..good }, "buffers_gpa is 8"),
        (Job { buffer_stride_bytes: 512, ..good }, "buffer_stride_bytes is 512"),
        (Job { buffer_stride_bytes: !511, ..good }, "buffer_stride_bytes"),
        (Job { buffers_gpa: (1 << 30) - 2048, ..good }, "crosses a 1 GiB boundary"),
        (Job { buffers_gpa: 1 << 44, ..good }, "below 16 TiB"),
        (Job { operations: 0, ..good }, "never end"),
        (Job { buffers_gpa: BUFFERS_GPA - 4096, ..good }, "no memory for a buffer of 4096 bytes"),
    ];
    for (job, message) in cases {
        let device = Device::new(disk_bytes(&good));
        let (mut queue, mut env) = device.handles();
        let mut expected = vec![1; usize::try_from(job.blocks()).unwrap().min(1 << 20)];
        let error = run(&job, &mut queue, &mut env, &mut expected).unwrap_err().to_string();
        assert!(error.contains(message), "{error} should contain {message}");
    }
}

#[test]
fn a_table_of_another_length_is_refused() {
    let device = Device::new(disk_bytes(&job()));
    let (mut queue, mut env) = device.handles();
    let mut try_with = |mut table: Vec<u64>| run(&job(), &mut queue, &mut env, &mut table).unwrap_err();
    assert_eq!(try_with(vec![1; 63]), JobError::ExpectedLength { blocks: 64, entries: 63 });
    let mut table = vec![1; 64];
    table[9] = 0;
    assert_eq!(try_with(table.clone()), JobError::UnknownContent { block: 9 });
    table[9] = 1 << 63;
    assert_eq!(try_with(table), JobError::NotAChecksum { block: 9 });
}

#[test]
fn reports_of_several_queues_add_up() {
    let first = Report { reads: 1, elapsed_ns: 5, ..Report::default() };
    let second = Report { reads: 2, elapsed_ns: 3, errors: 1, first_error_result: -5, ..Report::default() };
    let mut sum = first;
    sum.merge(&second);
    assert_eq!(sum, Report { reads: 3, elapsed_ns: 5, errors: 1, first_error_result: -5, ..Report::default() });
}

fn any_job() -> impl Strategy<Value = Job> {
    let waits = prop_oneof![Just(Wait::Poll), Just(Wait::Interrupt), Just(Wait::InterruptMuting)];
    (any::<u64>(), 1u32..64, 0u32..=100, 0u64..64, 0u32..4, waits).prop_map(
        |(seed, depth, write_percent, spare_blocks, block_shift, wait)| {
            let block_bytes = 512 << block_shift;
            Job {
                seed,
                depth,
                write_percent,
                block_bytes,
                area_bytes: (u64::from(depth) + spare_blocks) * u64::from(block_bytes),
                buffer_stride_bytes: u64::from(block_bytes),
                wait,
                ..job()
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_correct_device_leads_to_a_clean_report(job in any_job(), entries in 1usize..128) {
        let (device, expected, report) = run_after_prefill(&job, |device| device.set_queue_entries(entries));
        prop_assert!(report.is_clean(), "{report}");
        prop_assert_eq!(report.operations(), 1000);
        prop_assert_eq!(device.overlaps(), 0);
        for (block, &entry) in expected.iter().enumerate() {
            prop_assert_eq!(entry, checksum(&device.disk_block(&job, block)));
        }
    }

    #[test]
    fn a_fault_at_any_moment_is_found(job in any_job(), at in 0u64..1000, choice in 0usize..9, byte in 0usize..512) {
        let fault = [
            Fault::FlippedBit { byte },
            Fault::WrongBlock,
            Fault::MissingSector,
            Fault::Short,
            Fault::Error { res: -5 },
            Fault::Lost,
            Fault::Late { after_ns: 1_500_000 },
            Fault::Doubled,
            Fault::MadeUp { user_data: byte as u64 },
        ][choice];
        // Reads detect faults of contents.
        let job = if choice < 3 { Job { write_percent: 0, ..job } } else { job };
        let report = report_at(&job, at, fault);
        prop_assert!(!report.is_clean(), "{fault:?}: {report}");
    }
}

fn report_at(job: &Job, at: u64, fault: Fault) -> Report {
    run_after_prefill(job, |device| device.inject(at, fault)).2
}
