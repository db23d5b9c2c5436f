//! The outcome of a job.

use core::fmt;

/// The work of one queue, and all errors.
///
/// The structure has plain integers in C layout. Any bytes are a valid `Report`, so that the host can copy one from a
/// page that an untrusted guest wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[repr(C)]
pub struct Report {
    /// Number of reads that transferred all their bytes.
    pub reads: u64,
    /// Number of writes that transferred all their bytes.
    pub writes: u64,
    /// Number of bytes read and compared, regardless of the result.
    pub verified_bytes: u64,
    /// Number of reads with unexpected content.
    pub mismatches: u64,
    /// The block of the first mismatch, if there is one.
    pub first_mismatch_block: u64,
    /// The checksum of the data read from that block.
    pub first_mismatch_got: u64,
    /// The expected checksum of that block.
    pub first_mismatch_expected: u64,
    /// Number of requests that failed or transferred fewer (or more) bytes than requested.
    pub errors: u64,
    /// The result of the first such request: a negated errno, or the bytes transferred.
    pub first_error_result: i64,
    /// Number of completions that belong to no request in flight: doubled or invented.
    pub unexpected: u64,
    /// Number of requests without a completion within the job's `timeout_ns`. The device may still use their buffers.
    pub lost: u64,
    /// Number of lost requests that completed before the run ended.
    pub late: u64,
    /// Number of completions that were there when a wait for an interrupt timed out.
    pub missed_interrupts: u64,
    /// Time from before the first submission until after the last completion.
    pub elapsed_ns: u64,
    /// How often the workload rang the doorbell.
    pub doorbells: u64,
    /// Number of waits that an interrupt ended.
    pub interrupts: u64,
    /// Number of waits for an interrupt.
    pub sleeps: u64,
    /// How often the workload muted interrupts and unmuted them again.
    pub unmutes: u64,
}

impl Report {
    /// Number of requests that transferred all their bytes.
    pub fn operations(&self) -> u64 {
        self.reads.saturating_add(self.writes)
    }

    /// Whether there was no error.
    pub fn is_clean(&self) -> bool {
        [self.mismatches, self.errors, self.unexpected, self.lost, self.late, self.missed_interrupts] == [0; 6]
    }

    /// Adds the report of another queue that ran at the same time: sums the counts, and keeps the longer time, the
    /// first mismatch and the first error.
    pub fn merge(&mut self, other: &Self) {
        if self.mismatches == 0 {
            self.first_mismatch_block = other.first_mismatch_block;
            self.first_mismatch_got = other.first_mismatch_got;
            self.first_mismatch_expected = other.first_mismatch_expected;
        }
        if self.errors == 0 {
            self.first_error_result = other.first_error_result;
        }
        self.elapsed_ns = self.elapsed_ns.max(other.elapsed_ns);
        let counts = [
            (&mut self.reads, other.reads),
            (&mut self.writes, other.writes),
            (&mut self.verified_bytes, other.verified_bytes),
            (&mut self.mismatches, other.mismatches),
            (&mut self.errors, other.errors),
            (&mut self.unexpected, other.unexpected),
            (&mut self.lost, other.lost),
            (&mut self.late, other.late),
            (&mut self.missed_interrupts, other.missed_interrupts),
            (&mut self.doorbells, other.doorbells),
            (&mut self.interrupts, other.interrupts),
            (&mut self.sleeps, other.sleeps),
            (&mut self.unmutes, other.unmutes),
        ];
        for (count, more) in counts {
            // A report from an untrusted guest may contain any numbers.
            *count = count.saturating_add(more);
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} reads, {} writes, {} bytes verified", self.reads, self.writes, self.verified_bytes)?;
        if self.mismatches != 0 {
            write!(
                f,
                "; {} reads had wrong content, first block {} (checksum {:#018x}, expected {:#018x})",
                self.mismatches, self.first_mismatch_block, self.first_mismatch_got, self.first_mismatch_expected
            )?;
        }
        if self.errors != 0 {
            write!(f, "; {} requests failed or were short, first result {}", self.errors, self.first_error_result)?;
        }
        let others = [
            (self.unexpected, "completions belong to no request"),
            (self.lost, "requests got no completion in time"),
            (self.late, "of them completed late"),
            (self.missed_interrupts, "completions came without their interrupt"),
        ];
        for (count, what) in others {
            if count != 0 {
                write!(f, "; {count} {what}")?;
            }
        }
        Ok(())
    }
}
