//! Faults of the device: each one shows in the report.

use ringpass_workload::{Job, JobError, Report, Wait, checksum, prefill, run, verify_all};

use crate::device::{Device, Fault, disk_bytes, job};
use crate::run_after_prefill;

fn report_with(job: &Job, fault: Fault) -> Report {
    run_after_prefill(job, |device| device.inject(500, fault)).2
}

fn reads_only() -> Job {
    Job { write_percent: 0, ..job() }
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
fn a_queue_that_never_has_room_is_reported() {
    let job = Job { write_percent: 100, ..job() };
    let (_, expected, report) = run_after_prefill(&job, |device| device.set_queue_entries(0));
    assert_eq!((report.operations(), report.lost), (0, 1), "{report}");
    assert!(expected.iter().all(|&entry| entry != 0 && entry >> 63 == 0));
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
