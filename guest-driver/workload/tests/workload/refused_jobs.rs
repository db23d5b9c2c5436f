//! Jobs and tables that the workload refuses.

use ringpass_workload::{Job, JobError, run};

use crate::device::{BUFFERS_GPA, Device, disk_bytes, job};

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
        (Job { buffers_gpa: (1 << 30) - 2048, ..good }, "crosses a 4 MiB boundary"),
        (Job { buffers_gpa: 1 << 44, ..good }, "below 16384 GiB"),
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
