//! A search for SQEs that escape from a policy: they may change only registered buffers and the file in the table, and
//! nothing around these.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use anyhow::{Context, Result, ensure};
use memmap2::MmapMut;
use ringpass_restrictions::{
    Accepted, BuiltIn, CompiledPolicy, KernelSupport, LintContext, Mode, NopHole, Operation, Policy, RegisterOperation,
    Severity, Sqe, SqeFlags,
};

use crate::{
    canaries::{Canaries, pattern},
    differential::posts,
    restricted_ring::RestrictedRing,
    seed::Seed,
};

const PAGE_BYTES: usize = 4096;
/// The length of each registered buffer, and of the canary on both sides of it.
const BUFFER_BYTES: usize = 16 * PAGE_BYTES;
const BUFFERS: usize = 3;
/// The length of the file in the table.
const DISK_BYTES: u64 = 1 << 20;
/// The most to which writes may grow the file. Without a limit a run would fill the disk.
const DISK_MAX_BYTES: u64 = 1 << 24;
/// The number of SQEs between two checks of the canaries.
const BATCH: u32 = 256;

/// The counts of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// SQEs.
    pub sqes: u64,
    /// The SQEs that the kernel executed: their result was not an error.
    pub executed: u64,
    /// The number of checks of everything that must not change.
    pub looks: u64,
}

/// A ring with buffers between canary pages, a file in its table, and the canaries of a process.
struct Enclosure {
    ring: RestrictedRing,
    /// Canary, buffer, canary, buffer, … canary.
    memory: MmapMut,
    disk: File,
    /// A file that is never in the table. An SQE could reach it only by its descriptor.
    canaries: Canaries,
    expected: Vec<u8>,
    buffers: [u64; BUFFERS],
    /// The operations and flags that the policy allows.
    opcodes: Vec<u8>,
    flags_allowed: SqeFlags,
    flags_required: SqeFlags,
}

impl Enclosure {
    fn new(policy: &CompiledPolicy) -> Result<Self> {
        let canaries = Canaries::new()?;
        let disk = tempfile::tempfile()?;
        disk.write_all_at(&pattern(1, DISK_BYTES as usize), 0)?;
        let mut memory = MmapMut::map_anon((2 * BUFFERS + 1) * BUFFER_BYTES)?;
        let expected = pattern(2, memory.len());
        memory.copy_from_slice(&expected);
        let ring = RestrictedRing::disabled(BATCH)?;
        let directory = File::open(std::env::temp_dir())?;
        ring.submitter().register_files(&[disk.as_raw_fd(), directory.as_raw_fd()])?;
        let start = memory.as_mut_ptr();
        let address = |index: usize| start.wrapping_add((2 * index + 1) * BUFFER_BYTES);
        let iovecs: Vec<_> = (0..BUFFERS)
            .map(|index| nix::libc::iovec { iov_base: address(index).cast(), iov_len: BUFFER_BYTES })
            .collect();
        // SAFETY: the mapping outlives the ring, which waits for all its requests; the test looks at it only between
        // batches.
        unsafe { ring.submitter().register_buffers(&iovecs) }?;
        let table: Vec<_> = policy.entries().iter().map(|entry| entry.kind()).collect();
        let ring = ring.enable(&table)?;
        let buffers = std::array::from_fn(|index| address(index).addr() as u64);
        let policy = policy.policy();
        let opcodes = policy.operations().iter().map(|operation| operation.code()).collect();
        let (flags_allowed, flags_required) = (policy.flags_allowed(), policy.flags_required());
        Ok(Self { ring, memory, disk, canaries, expected, buffers, opcodes, flags_allowed, flags_required })
    }

    /// A random SQE: an SQE that passes, with some fields replaced by random bytes or by interesting values.
    fn sqe(&self, rng: &mut fastrand::Rng) -> Sqe {
        let mut words = [0; 8];
        words.fill_with(|| rng.u64(..));
        let random = Sqe::from_words(words);
        if rng.u8(..16) == 0 {
            return random;
        }
        let slot = rng.usize(..BUFFERS);
        let offset = rng.u64(..2 * BUFFER_BYTES as u64);
        let good = Sqe {
            opcode: self.opcodes[rng.usize(..self.opcodes.len())],
            flags: self.flags_required.bits() | self.flags_allowed.bits() & rng.u8(..) & rng.u8(..),
            off: rng.u64(..DISK_BYTES),
            addr: self.buffers[slot] + offset % BUFFER_BYTES as u64,
            len: rng.u32(..=2 * PAGE_BYTES as u32),
            buf_index: slot as u16,
            ..Sqe::default()
        };
        let canary = self.canaries.address();
        let targets = [canary, self.buffers[slot] - 1, self.buffers[slot] + BUFFER_BYTES as u64 - 1, 0, u64::MAX];
        let lengths = [0, 1, BUFFER_BYTES as u32, u32::MAX, 0x8000_0000];
        match rng.u8(..14) {
            0 => Sqe { opcode: rng.u8(..), ..good },
            1 => Sqe { opcode: rng.u8(..70), addr: canary, fd: rng.i32(0..64), ..good },
            2 => Sqe { flags: rng.u8(..), fd: rng.i32(0..64), ..good },
            3 => Sqe { fd: rng.i32(-1..64), ..good },
            4 => Sqe { addr: targets[rng.usize(..targets.len())], ..good },
            5 => Sqe { len: lengths[rng.usize(..lengths.len())], ..good },
            6 => Sqe { buf_index: rng.u16(..8), ..good },
            7 => Sqe { rw_flags: rng.u32(..) & rng.u32(..), ..good },
            8 => Sqe { ioprio: rng.u16(..), ..good },
            9 => Sqe { addr3: canary, attr_type_mask: rng.u64(..4), ..good },
            10 => Sqe { file_index: rng.u32(..), personality: rng.u16(..4), ..good },
            11 => Sqe { off: [u64::MAX, 1 << 62, DISK_BYTES - 1][rng.usize(..3)], ..good },
            12 => Sqe { addr: random.addr, len: random.len, ..good },
            _ => good,
        }
    }

    /// Submits these SQEs, and returns the number of requests that the kernel executed.
    fn submit(&mut self, batch: &[Sqe]) -> Result<u64> {
        if self.flags_allowed != SqeFlags::FIXED_FILE {
            // Requests may wait for others, or post no CQE. A later check finds what they do late. SAFETY: the test
            // finds out that the kernel accesses only the buffers; no other code uses these or the file as long as the
            // ring lives. This structure owns the canaries, and looks at them only between batches.
            return Ok(unsafe { self.ring.submit_on(batch) }? as u64);
        }
        let mut chain = None;
        let cqes = batch.iter().filter(|sqe| posts(&mut chain, sqe)).count();
        // SAFETY: as above.
        let results = unsafe { self.ring.submit(batch, cqes) }?;
        Ok(results.iter().filter(|result| result.is_some_and(|result| result >= 0)).count() as u64)
    }

    /// Checks that nothing has changed that must not change.
    fn look(&mut self) -> Result<()> {
        for index in (0..self.memory.len() / BUFFER_BYTES).step_by(2) {
            let range = index * BUFFER_BYTES..(index + 1) * BUFFER_BYTES;
            ensure!(
                self.memory[range.clone()] == self.expected[range],
                "the memory around buffer {} is changed",
                index / 2
            );
        }
        let damage = self.canaries.damage()?;
        ensure!(damage.is_empty(), "{damage:?}");
        if self.disk.metadata()?.len() > DISK_MAX_BYTES {
            self.disk.set_len(DISK_BYTES)?;
        }
        Ok(())
    }
}

/// Submits `sqes` SQEs under a policy, and checks everything around after each batch.
///
/// # Errors
///
/// An SQE changed something outside. The error has the seed and the batch.
pub fn run(policy: &CompiledPolicy, seed: Seed, sqes: u64) -> Result<Outcome> {
    let mut rng = seed.rng();
    let mut enclosure = Enclosure::new(policy)?;
    let mut outcome = Outcome::default();
    while outcome.sqes < sqes {
        let batch: Vec<Sqe> = (0..BATCH).map(|_| enclosure.sqe(&mut rng)).collect();
        outcome.executed += enclosure.submit(&batch).with_context(|| format!("{seed}"))?;
        outcome.sqes += u64::from(BATCH);
        enclosure.look().with_context(|| format!("{seed}, in the batch that ends at SQE {}", outcome.sqes))?;
        outcome.looks += 1;
    }
    Ok(outcome)
}

/// The built-in policies that a kernel enforces.
///
/// # Errors
///
/// The kernel lacks an operation.
pub fn built_in(kernel: &KernelSupport) -> Result<Vec<CompiledPolicy>> {
    let policies = BuiltIn::ALL.into_iter().filter(|built_in| matches!(built_in, BuiltIn::Direct(_)));
    Ok(policies.map(|built_in| built_in.policy().compile(kernel)).collect::<Result<_, _>>()?)
}

/// A random policy in which the lint finds no error in direct mode: some of the operations and some of the flags
/// without errors. The policy accepts what can exhaust the host or hang the ring, and no guest may escape all the same.
///
/// # Errors
///
/// The kernel lacks an operation.
pub fn any_without_errors(rng: &mut fastrand::Rng, kernel: &KernelSupport, nop: NopHole) -> Result<CompiledPolicy> {
    let context = LintContext::new(Mode::Direct, Some(kernel.semantics)).nop(nop);
    let is_clean = |policy: &Policy| policy.lint(&context).iter().all(|finding| finding.severity < Severity::Error);
    let register = RegisterOperation::REGISTER_EVENTFD;
    let base = Policy::new()
        .allow_register(register)
        .with_flags_allowed(SqeFlags::FIXED_FILE)
        .with_flags_required(SqeFlags::FIXED_FILE)
        .with_accepted(Accepted::ORDERED_REQUESTS | Accepted::COMPLETION_FLOOD);
    let operations: Vec<Operation> =
        kernel.operations.iter().filter(|&operation| is_clean(&base.allow(operation))).collect();
    ensure!(operations.contains(&Operation::WRITE_FIXED), "lint finds an error in writes: {operations:?}");
    loop {
        let mut policy = base;
        for &operation in operations.iter().filter(|_| rng.bool()) {
            policy = policy.allow(operation);
        }
        let (allowed, required) = (rng.u8(..) & rng.u8(..), rng.u8(..) & rng.u8(..) & rng.u8(..));
        let required = SqeFlags::from_bits_retain(required) | SqeFlags::FIXED_FILE;
        let allowed = SqeFlags::from_bits_retain(allowed) | required;
        let policy = policy.with_flags_allowed(allowed).with_flags_required(required);
        if is_clean(&policy) {
            return Ok(policy.compile(kernel)?);
        }
    }
}
