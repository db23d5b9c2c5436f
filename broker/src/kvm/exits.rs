//! Counts of a vCPU's exits: KVM's binary statistics (`KVM_GET_STATS_FD`, Linux 5.14).

use std::fs::File;
use std::io;
use std::ops::Sub;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

use super::KvmError;

/// Counts of a vCPU since its creation. The difference of two readings is the count in between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Exits {
    /// All exits, including those for the host's own interrupts.
    pub all: u64,
    /// Exits for port I/O.
    pub port_io: u64,
    /// Exits for accesses to addresses with no memory.
    pub mmio: u64,
    /// Hypercalls.
    pub hypercalls: u64,
    /// Exits for a halted vCPU.
    pub halts: u64,
}

impl Exits {
    /// Exits by which a guest asks for something: port I/O, MMIO and hypercalls.
    pub fn requested(&self) -> u64 {
        self.port_io + self.mmio + self.hypercalls
    }
}

impl Sub for Exits {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            all: self.all.saturating_sub(earlier.all),
            port_io: self.port_io.saturating_sub(earlier.port_io),
            mmio: self.mmio.saturating_sub(earlier.mmio),
            hypercalls: self.hypercalls.saturating_sub(earlier.hypercalls),
            halts: self.halts.saturating_sub(earlier.halts),
        }
    }
}

/// A vCPU's counters. Any thread can read them while the vCPU runs.
#[derive(Debug)]
pub struct ExitCounters {
    file: File,
    /// The offsets of the counters of [`Exits`] in the file, in bytes, in the order of [`NAMES`].
    offsets_bytes: [u64; NAMES.len()],
}

/// The kernel's names (`kvm_vcpu_stats_desc`, arch/x86/kvm/x86.c).
const NAMES: [&str; 5] = ["exits", "io_exits", "mmio_exits", "hypercalls", "halt_exits"];

/// `struct kvm_stats_header`, six `u32`s.
const HEADER_BYTES: usize = 24;
/// `struct kvm_stats_desc` without the name that follows it.
const DESCRIPTOR_BYTES: usize = 16;

nix::ioctl_none!(
    /// `KVM_GET_STATS_FD`.
    kvm_get_stats_fd,
    kvm_bindings::KVMIO,
    0xce
);

impl ExitCounters {
    /// The counters of `vcpu`.
    ///
    /// # Errors
    ///
    /// The kernel is older than 5.14, or lacks one of the counters.
    pub fn of(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        // SAFETY: the ioctl takes no argument and returns a new descriptor.
        let fd = unsafe { kvm_get_stats_fd(vcpu.as_raw_fd()) }
            .map_err(KvmError::system("opening a vCPU's statistics (KVM_GET_STATS_FD, Linux 5.14)"))?;
        // SAFETY: the descriptor is new and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let file = File::from(fd);
        let offsets_bytes = find(&file)?;
        Ok(Self { file, offsets_bytes })
    }

    /// The counts now.
    pub fn read(&self) -> Result<Exits, KvmError> {
        let mut counts = [0; NAMES.len()];
        for (count, offset_bytes) in counts.iter_mut().zip(self.offsets_bytes) {
            let mut bytes = [0; 8];
            self.file.read_exact_at(&mut bytes, offset_bytes).map_err(failed)?;
            *count = u64::from_ne_bytes(bytes);
        }
        let [all, port_io, mmio, hypercalls, halts] = counts;
        Ok(Exits { all, port_io, mmio, hypercalls, halts })
    }
}

/// The offset of each of [`NAMES`].
fn find(file: &File) -> Result<[u64; NAMES.len()], KvmError> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0).map_err(failed)?;
    let [_flags, name_bytes, descriptors, _id, descriptors_at, data_at] = words(&header);
    let descriptor_bytes = DESCRIPTOR_BYTES + name_bytes as usize;
    let mut table = vec![0; descriptor_bytes * descriptors as usize];
    file.read_exact_at(&mut table, descriptors_at.into()).map_err(failed)?;

    let mut offsets_bytes = [0; NAMES.len()];
    for (found, wanted) in offsets_bytes.iter_mut().zip(NAMES) {
        let is_wanted = |descriptor: &&[u8]| {
            let name = &descriptor[DESCRIPTOR_BYTES..];
            name.split(|byte| *byte == 0).next() == Some(wanted.as_bytes())
        };
        let descriptor =
            table.chunks_exact(descriptor_bytes).find(is_wanted).ok_or(KvmError::NoCounter { name: wanted })?;
        // flags, exponent and size, offset, bucket size
        let [_, _, offset_bytes, _] = words(descriptor);
        *found = u64::from(data_at) + u64::from(offset_bytes);
    }
    Ok(offsets_bytes)
}

/// The first words of `bytes`.
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    std::array::from_fn(|index| {
        u32::from_ne_bytes(*bytes[index * 4..].first_chunk().expect("the kernel's structures have all their fields"))
    })
}

fn failed(source: io::Error) -> KvmError {
    KvmError::System { what: "reading a vCPU's statistics", source }
}
