//! Whether SQEs of any bytes stay inside: registered buffers, the file in the table, and everything around them that must
//! stay as it is.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use anyhow::{Context, Result, ensure};
use memmap2::MmapMut;
use ringpass_restrictions::{BuiltIn, CompiledPolicy, KernelSupport, Sqe, SqeFlags};

use crate::{
    canaries::{Canaries, pattern},
    differential::posts,
    restricted_ring::RestrictedRing,
    seed::Seed,
};

const PAGE_BYTES: usize = 4096;
/// Of each registered buffer; as much on both sides of it is canary.
const BUFFER_BYTES: usize = 16 * PAGE_BYTES;
const BUFFERS: usize = 3;
/// Of the file in the table.
const DISK_BYTES: u64 = 1 << 20;
/// The file may be grown by writes: not further than this, or a run fills the disk.
const DISK_MAX_BYTES: u64 = 1 << 24;
/// SQEs between two looks at the canaries.
const BATCH: u32 = 256;

/// What a run has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// SQEs.
    pub sqes: u64,
    /// Those that did something: their result was not an error.
    pub executed: u64,
    /// Looks at everything that must stay as it is.
    pub looks: u64,
}

/// A ring with buffers between canary pages, one file, and the canaries of a process.
struct Enclosure {
    ring: RestrictedRing,
    /// Canary, buffer, canary, buffer, … canary.
    memory: MmapMut,
    disk: File,
    /// Never in the table; what the guest may reach only by its descriptor.
    canaries: Canaries,
    expected: Vec<u8>,
    buffers: [u64; BUFFERS],
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
        // SAFETY: the mapping outlives the ring, which waits for all its requests; it is looked at between batches only.
        unsafe { ring.submitter().register_buffers(&iovecs) }?;
        let table: Vec<_> = policy.entries().iter().map(|entry| entry.kind()).collect();
        let ring = ring.enable(&table)?;
        let buffers = std::array::from_fn(|index| address(index).addr() as u64);
        Ok(Self { ring, memory, disk, canaries, expected, buffers })
    }

    /// Anything: near what passes, with some of it replaced by random bytes or by what is worth trying.
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
            opcode: [4, 5][rng.usize(..2)],
            flags: SqeFlags::FIXED_FILE.bits(),
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

    /// Everything that must be as it was.
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

/// Submits `sqes` SQEs under a policy and looks at everything around after each batch.
///
/// # Errors
///
/// Something is changed that must not be: with the seed, and the batch after which it was.
pub fn run(policy: &CompiledPolicy, seed: Seed, sqes: u64) -> Result<Outcome> {
    let mut rng = seed.rng();
    let mut enclosure = Enclosure::new(policy)?;
    let mut outcome = Outcome::default();
    while outcome.sqes < sqes {
        let batch: Vec<Sqe> = (0..BATCH).map(|_| enclosure.sqe(&mut rng)).collect();
        // No policy here lets a link pass, or an SQE without a CQE.
        let mut chain = None;
        let cqes = batch.iter().filter(|sqe| posts(&mut chain, sqe)).count();
        // SAFETY: that nothing but the buffers is touched is what this finds out; the canaries are owned here and looked
        // at between batches only.
        let results = unsafe { enclosure.ring.submit(&batch, cqes) }.with_context(|| format!("{seed}"))?;
        outcome.sqes += u64::from(BATCH);
        outcome.executed += results.iter().filter(|result| result.is_some_and(|result| result >= 0)).count() as u64;
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
