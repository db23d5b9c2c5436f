//! Compares the kernel's restrictions with the checker in user space: the same SQEs, on a real restricted ring and in
//! the model.
//!
//! The comparison submits an SQE that the checker refuses as it is, with random bytes everywhere else: the kernel
//! executes it only if the two disagree. An SQE that the checker allows gets a personality that does not exist. The
//! kernel looks at it right after the restrictions: the SQE fails with EINVAL before the kernel does anything, and with
//! EACCES if the kernel does not agree.

use anyhow::{Result, bail};
use ringpass_restrictions::{
    KernelRules, KernelSupport, Operation, RegisterOperation, RestrictionKind, RingMemory, Sqe, SqeFlags, Verdict,
};

use crate::{restricted_ring::RestrictedRing, seed::Seed};

/// The `personality` of an SQE that the kernel must not execute. No personality is ever registered.
const NOBODY: u16 = 0xdead;
const EINVAL: i32 = 22;
/// The number of SQEs in one system call.
pub const BATCH: u32 = 1024;

/// A restriction table and SQEs, in the order in which a ring gets them, batch by batch.
#[derive(Clone, Debug)]
pub struct Case {
    /// The table, in any order, with repetitions, perhaps of one class only.
    pub table: Vec<RestrictionKind>,
    /// The SQEs.
    pub sqes: Vec<Sqe>,
}

/// An SQE on which kernel and checker do not agree.
#[derive(Clone, Debug)]
pub struct Disagreement {
    /// The table.
    pub table: Vec<RestrictionKind>,
    /// The SQE as it was submitted.
    pub sqe: Sqe,
    /// The checker's verdict.
    pub verdict: Verdict,
    /// The result that follows from the verdict; `None` for no CQE.
    pub expected: Option<i32>,
    /// The kernel's result.
    pub kernel: Option<i32>,
    /// Whether the SQE alone, on a new ring, shows it too.
    pub alone: bool,
}

impl Case {
    /// Makes the allowed SQEs harmless, and returns the expected verdict and result of each SQE.
    fn expect(&mut self, rules: &KernelRules) -> Vec<(Verdict, Option<i32>)> {
        let mut memory = RingMemory::default();
        let mut expected = Vec::with_capacity(self.sqes.len());
        for batch in self.sqes.chunks_mut(BATCH as usize) {
            let mut chain = None;
            for sqe in batch {
                let verdict = rules.check_next(sqe, &mut memory);
                let result = match verdict {
                    Verdict::Refused(refusal) => -refusal.errno(),
                    Verdict::Allowed => {
                        sqe.personality = NOBODY;
                        -EINVAL
                    }
                };
                expected.push((verdict, posts(&mut chain, sqe).then_some(result)));
            }
        }
        expected
    }
}

/// Whether an SQE posts a CQE, if no SQE with a link or with `IOSQE_CQE_SKIP_SUCCESS` succeeds. All SQEs do, except the
/// later ones of a chain whose first SQE has `IOSQE_CQE_SKIP_SUCCESS`, although it was refused. `chain` says whether
/// the current chain is such a chain.
pub(crate) fn posts(chain: &mut Option<bool>, sqe: &Sqe) -> bool {
    let flags = SqeFlags::from_bits_retain(sqe.flags);
    let is_silent = chain.is_some_and(|silent| silent);
    let silent = chain.unwrap_or(flags.contains(SqeFlags::CQE_SKIP_SUCCESS));
    *chain = flags.intersects(SqeFlags::IO_LINK | SqeFlags::IO_HARDLINK).then_some(silent);
    !is_silent
}

/// Submits the SQEs of the case to a real ring and compares.
///
/// # Errors
///
/// The kernel refuses to make the ring.
pub fn compare(case: &Case, kernel: &KernelSupport) -> Result<Option<Disagreement>> {
    let mut case = case.clone();
    let rules = KernelRules::of_kinds(case.table.iter().copied(), kernel);
    let expected = case.expect(&rules);
    let entries = BATCH.min(u32::try_from(case.sqes.len().max(1))?.next_power_of_two());
    let mut ring = RestrictedRing::new(entries, &case.table)?;
    for (batch, expected) in case.sqes.chunks(BATCH as usize).zip(expected.chunks(BATCH as usize)) {
        let cqes = expected.iter().filter(|(_, result)| result.is_some()).count();
        // SAFETY: the kernel executes none of them, unless it disagrees with the checker; then the test fails.
        let results = unsafe { ring.submit(batch, cqes) }?;
        for ((sqe, (verdict, expected)), kernels) in batch.iter().zip(expected).zip(results) {
            if kernels != *expected {
                let (table, sqe, verdict, expected) = (case.table.clone(), *sqe, *verdict, *expected);
                return Ok(Some(Disagreement { table, sqe, verdict, expected, kernel: kernels, alone: false }));
            }
        }
    }
    Ok(None)
}

/// The smallest case that still shows the disagreement: the SQE alone, if that is enough.
fn shrink(found: Disagreement, kernel: &KernelSupport) -> Result<Disagreement> {
    let alone = Case { table: found.table.clone(), sqes: vec![found.sqe] };
    Ok(compare(&alone, kernel)?.map_or(found, |alone| Disagreement { alone: true, ..alone }))
}

/// The counts of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// SQEs.
    pub cases: u64,
    /// Tables, each on a ring of its own.
    pub tables: u64,
    /// SQEs that were allowed.
    pub allowed: u64,
    /// SQEs that the table refused.
    pub refused_by_table: u64,
    /// SQEs that the kernel refuses under any table.
    pub refused_before: u64,
}

impl Tally {
    fn add(&mut self, case: &Case, rules: &KernelRules) {
        let mut memory = RingMemory::default();
        self.tables += 1;
        for sqe in &case.sqes {
            self.cases += 1;
            match rules.check_next(sqe, &mut memory) {
                Verdict::Allowed => self.allowed += 1,
                Verdict::Refused(refusal) if refusal.is_of_restrictions() => self.refused_by_table += 1,
                Verdict::Refused(_) => self.refused_before += 1,
            }
        }
    }
}

/// Compares one case and counts it.
///
/// # Errors
///
/// A disagreement, or the kernel refuses to make the ring.
pub fn check(case: &Case, kernel: &KernelSupport, tally: &mut Tally) -> Result<()> {
    tally.add(case, &KernelRules::of_kinds(case.table.iter().copied(), kernel));
    match compare(case, kernel)? {
        None => Ok(()),
        Some(found) => bail!("kernel and checker do not agree: {:#?}", shrink(found, kernel)?),
    }
}

/// All 256 opcodes with all 256 flags under one table.
///
/// # Errors
///
/// A disagreement, or the kernel refuses to make the ring.
pub fn exhaustive(table: &[RestrictionKind], kernel: &KernelSupport) -> Result<Tally> {
    let mut tally = Tally::default();
    // Each flag has a ring of its own: once a ring has seen CQE_SKIP_SUCCESS, it never drains again.
    for flags in 0..=u8::MAX {
        let sqes = (0..=u8::MAX).map(|opcode| Sqe { opcode, flags, fd: -1, ..Sqe::default() }).collect();
        check(&Case { table: table.to_vec(), sqes }, kernel, &mut tally)?;
    }
    Ok(tally)
}

/// Random tables with random SQEs, `cases` SQEs in all.
///
/// # Errors
///
/// A disagreement, with the seed; or the kernel refuses to make a ring.
pub fn random(seed: Seed, cases: u64, kernel: &KernelSupport) -> Result<Tally> {
    let mut rng = seed.rng();
    let mut tally = Tally::default();
    while tally.cases < cases {
        let sqes =
            [1, 64, BATCH, 4 * BATCH][rng.usize(..4)].min(u32::try_from(cases - tally.cases).unwrap_or(u32::MAX));
        let case = random_case(&mut rng, kernel, sqes);
        check(&case, kernel, &mut tally).map_err(|error| error.context(format!("{seed}")))?;
    }
    Ok(tally)
}

fn random_case(rng: &mut fastrand::Rng, kernel: &KernelSupport, sqes: u32) -> Case {
    let table = random_table(rng, kernel);
    let flags_near = table_flags(&table);
    Case { sqes: (0..sqes).map(|_| random_sqe(rng, &flags_near)).collect(), table }
}

/// A random table of any kind that a kernel takes: none, one or many operations, and flags never, once or several
/// times.
fn random_table(rng: &mut fastrand::Rng, kernel: &KernelSupport) -> Vec<RestrictionKind> {
    let operations: Vec<Operation> = kernel.numbered.iter().collect();
    let register: Vec<RegisterOperation> = kernel.register_operations.iter().collect();
    let flags = |rng: &mut fastrand::Rng| SqeFlags::from_bits_retain(rng.u8(..) & rng.u8(..));
    let mut table = Vec::new();
    for _ in 0..[0, 1, 3, operations.len()][rng.usize(..4)] {
        table.push(RestrictionKind::Operation(operations[rng.usize(..operations.len())]));
    }
    for _ in 0..[0, 1, 1, 2][rng.usize(..4)] {
        table.push(RestrictionKind::FlagsAllowed(flags(rng)));
    }
    for _ in 0..[0, 1, 1, 2][rng.usize(..4)] {
        // A table with many required flags lets no SQE pass.
        let few = flags(rng).bits() & rng.u8(..);
        table.push(RestrictionKind::FlagsRequired(SqeFlags::from_bits_retain(few)));
    }
    for _ in 0..[0, 1, 2][rng.usize(..3)] {
        table.push(RestrictionKind::RegisterOperation(register[rng.usize(..register.len())]));
    }
    rng.shuffle(&mut table);
    // The kernel takes only as many entries as there are kinds of entries.
    table.truncate(operations.len() + register.len());
    if table.is_empty() {
        // The table is never empty: for an empty table the kernel wants no pointer, but the crate passes one.
        table.push(RestrictionKind::FlagsAllowed(SqeFlags::empty()));
    }
    table
}

/// The flags of the table. An SQE with similar flags has a chance to pass.
fn table_flags(table: &[RestrictionKind]) -> Vec<u8> {
    let flags = table.iter().filter_map(|entry| match entry {
        RestrictionKind::FlagsAllowed(flags) | RestrictionKind::FlagsRequired(flags) => Some(flags.bits()),
        _ => None,
    });
    flags.collect()
}

fn random_sqe(rng: &mut fastrand::Rng, flags_near: &[u8]) -> Sqe {
    let mut words = [0; 8];
    words.fill_with(|| rng.u64(..));
    let flags = match (rng.u8(..4), flags_near) {
        (0, _) | (_, []) => rng.u8(..),
        (1, _) => 0,
        (2, near) => near.iter().fold(0, |all, flags| all | flags),
        (_, near) => near[rng.usize(..near.len())] ^ (1 << rng.u8(..8)),
    };
    let opcode = if rng.u8(..8) == 0 { rng.u8(..) } else { rng.u8(..70) };
    Sqe { opcode, flags, ..Sqe::from_words(words) }
}
