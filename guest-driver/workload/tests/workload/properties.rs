//! Any job on a correct device, and on a device with one fault.

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use ringpass_workload::{Job, Report, Wait, checksum};

use crate::device::{Fault, job};
use crate::run_after_prefill;

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
