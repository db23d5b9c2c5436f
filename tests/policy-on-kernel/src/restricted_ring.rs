//! A restricted ring of the test that takes any 64 bytes as an SQE.

use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, cqueue, register, squeue};
use ringpass_restrictions::{RestrictionKind, Sqe};

/// A ring under a restriction table. When an SQE fails, the kernel continues with the next one
/// (`IORING_SETUP_SUBMIT_ALL`, 5.18).
pub struct RestrictedRing {
    ring: IoUring,
    entries: u32,
}

impl RestrictedRing {
    /// Makes a disabled ring without restrictions.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn disabled(entries: u32) -> Result<Self> {
        let ring =
            IoUring::builder().setup_r_disabled().setup_submit_all().build(entries).context("cannot make a ring")?;
        Ok(Self { ring, entries })
    }

    /// Makes an enabled ring with a table in force.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn new(entries: u32, table: &[RestrictionKind]) -> Result<Self> {
        Self::disabled(entries)?.enable(table)
    }

    /// Puts a table in force and enables the ring.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn enable(self, table: &[RestrictionKind]) -> Result<Self> {
        let mut table: Vec<register::Restriction> = table.iter().copied().map(kernels).collect();
        self.ring.submitter().register_restrictions(&mut table).context("cannot restrict the ring")?;
        self.ring.submitter().register_enable_rings().context("cannot enable the ring")?;
        Ok(self)
    }

    /// The submitter, which registers files and buffers.
    pub fn submitter(&self) -> io_uring::Submitter<'_> {
        self.ring.submitter()
    }

    /// Submits the SQEs, waits for `expected` CQEs, and returns the result of each SQE in their order: `None` without a
    /// CQE. There must be no more SQEs than the ring has entries. This function sets the field `user_data` of the SQEs.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or a CQE belongs to no SQE.
    ///
    /// # Safety
    ///
    /// The SQEs may name any memory. Everything that the ring's restrictions let them do must be sound.
    pub unsafe fn submit(&mut self, sqes: &[Sqe], expected: usize) -> Result<Vec<Option<i32>>> {
        // SAFETY: the contract is the same.
        unsafe { self.submit_and_wait(sqes, expected) }?;
        let mut results = vec![None; sqes.len()];
        // The notification of a zero-copy send is not its result.
        for cqe in self.ring.completion().filter(|cqe| !cqueue::notif(cqe.flags())) {
            let index = usize::try_from(cqe.user_data()).context("a CQE of no SQE")?;
            let result = results.get_mut(index).with_context(|| format!("a CQE of no SQE: {index}"))?;
            ensure!(result.replace(cqe.result()).is_none(), "two CQEs for SQE {index}");
        }
        Ok(results)
    }

    /// Submits the SQEs and waits for none of them: the number of CQEs is unknown, and some requests run on. Returns
    /// the number of CQEs without an error, of these SQEs or of earlier ones.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    ///
    /// # Safety
    ///
    /// As for [`submit`](Self::submit), for as long as the ring lives.
    pub unsafe fn submit_on(&mut self, sqes: &[Sqe]) -> Result<usize> {
        // SAFETY: the contract is the same.
        unsafe { self.submit_and_wait(sqes, 0) }?;
        Ok(self.ring.completion().filter(|cqe| cqe.result() >= 0).count())
    }

    /// # Safety
    ///
    /// As for [`submit`](Self::submit).
    unsafe fn submit_and_wait(&mut self, sqes: &[Sqe], expected: usize) -> Result<()> {
        ensure!(sqes.len() <= self.entries as usize, "more SQEs than the ring has entries");
        for (index, sqe) in (0u64..).zip(sqes) {
            let words = Sqe { user_data: index, ..*sqe }.to_words();
            // SAFETY: the entry is the kernel's structure of 64 bytes, for which any bits are valid.
            let entry = unsafe { std::mem::transmute::<[u64; 8], squeue::Entry>(words) };
            // SAFETY: what the entry names is the caller's contract.
            unsafe { self.ring.submission().push(&entry) }.context("the SQ is full")?;
        }
        let submitted = self.ring.submit_and_wait(expected).context("io_uring_enter")?;
        ensure!(submitted == sqes.len(), "{submitted} of {} SQEs were consumed", sqes.len());
        Ok(())
    }
}

fn kernels(kind: RestrictionKind) -> register::Restriction {
    match kind {
        RestrictionKind::RegisterOperation(operation) => register::Restriction::register_op(operation.code()),
        RestrictionKind::Operation(operation) => register::Restriction::sqe_op(operation.code()),
        RestrictionKind::FlagsAllowed(flags) => register::Restriction::sqe_flags_allowed(flags.bits()),
        RestrictionKind::FlagsRequired(flags) => register::Restriction::sqe_flags_required(flags.bits()),
    }
}
