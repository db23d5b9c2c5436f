//! A job of the workload, as a part of a command.

use ringpass_workload::{Job, Verify, Wait};

use crate::words::{Reader, Writer};

/// The position of a job's table of expected contents: entries of eight bytes in the program region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Offset from the start of the program region.
    pub offset_bytes: u64,
    /// Number of entries.
    pub entries: u64,
}

pub(super) fn put_job(words: &mut Writer, kind: u64, job: &Job, table: Table) {
    let Job {
        area_offset_bytes,
        area_bytes,
        operations,
        duration_ns,
        timeout_ns,
        pause_ns,
        seed,
        buffers_gpa,
        buffer_stride_bytes,
        block_bytes,
        depth,
        write_percent,
        durable_percent,
        wait,
        verify,
    } = *job;
    let long = [
        kind,
        table.offset_bytes,
        table.entries,
        area_offset_bytes,
        area_bytes,
        operations,
        duration_ns,
        timeout_ns,
        pause_ns,
        seed,
        buffers_gpa,
        buffer_stride_bytes,
    ];
    long.into_iter().for_each(|value| words.put(value));
    let short = [block_bytes, depth, write_percent, durable_percent, wait as u32, verify as u32];
    short.into_iter().for_each(|value| words.put(value));
}

pub(super) fn take_job(words: &mut Reader<'_>) -> Option<(Job, Table)> {
    let table = Table { offset_bytes: words.take(), entries: words.take() };
    let job = Job {
        area_offset_bytes: words.take(),
        area_bytes: words.take(),
        operations: words.take(),
        duration_ns: words.take(),
        timeout_ns: words.take(),
        pause_ns: words.take(),
        seed: words.take(),
        buffers_gpa: words.take(),
        buffer_stride_bytes: words.take(),
        block_bytes: words.take_u32()?,
        depth: words.take_u32()?,
        write_percent: words.take_u32()?,
        durable_percent: words.take_u32()?,
        wait: {
            let value = words.take();
            [Wait::Poll, Wait::Interrupt, Wait::InterruptMuting].into_iter().find(|wait| *wait as u64 == value)?
        },
        verify: {
            let value = words.take();
            [Verify::Off, Verify::On].into_iter().find(|verify| *verify as u64 == value)?
        },
    };
    Some((job, table))
}
