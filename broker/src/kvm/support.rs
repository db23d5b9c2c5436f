//! The abilities of this machine's KVM, found by trying.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::fs::MemfdFlags;
use vm_memory::{Bytes, GuestAddress};

use super::events::{Doorbell, Interrupt};
use super::{ExitCounters, KvmError, RamSlots};
use crate::memory::{GuestMemory, RegionConfig};

/// The parts of KVM that work for this process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvmSupport {
    /// A completion can interrupt a guest inside the kernel.
    pub irqfd: bool,
    /// A doorbell can be handled inside the kernel.
    pub ioeventfd: bool,
    /// Exits can be counted.
    pub statistics: bool,
    /// Most pages in a ring of pages that a vCPU has written to, for live migration; 0: KVM has no such rings.
    pub dirty_ring_pages: u64,
    /// The speed of a guest's kernel, in picoseconds per instruction of a short loop at CPL 0. None: it does not run.
    pub kernel_ps_per_instruction: Option<u64>,
}

/// Why this process cannot make virtual machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmRefusal {
    /// The step that failed.
    pub step: &'static str,
    /// The error number.
    pub errno: i32,
}

/// Above this time per instruction the processor does not run the loop itself: a processor of 1 GHz takes 1 ns for
/// each, and software at least some hundred.
const NATIVE_PS_MAX: u64 = 50_000;

/// The loop, 32-bit code: `mov ecx, LOOPS; 1: dec ecx; jnz 1b; out 0, al`.
const LOOPS: u32 = 20_000;
const INSTRUCTIONS: u64 = 2 * LOOPS as u64 + 2;

/// KVM returns `EINTR` when anything is pending for the thread, including the end of a ring that the thread created.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == nix::libc::EINTR => {}
            other => return other,
        }
    }
}

impl KvmSupport {
    /// Tries everything with a throw-away VM. Takes milliseconds, or some hundred where software runs CPL 0.
    ///
    /// # Errors
    ///
    /// [`KvmRefusal`] if this process cannot make virtual machines.
    pub fn observe() -> Result<Self, KvmRefusal> {
        let refused = |step| move |error: kvm_ioctls::Error| KvmRefusal { step, errno: error.errno() };
        let kvm = Kvm::new().map_err(refused("opening /dev/kvm"))?;
        let vm = Arc::new(create_vm(&kvm).map_err(refused("making a virtual machine"))?);
        let irqchip = vm.create_irq_chip();
        let ring_pages = [KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL]
            .map(|cap| u64::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0));
        let vcpu = vm.create_vcpu(0);
        Ok(Self {
            irqfd: irqchip.is_ok() && Interrupt::new(&vm, 0).is_ok(),
            ioeventfd: Doorbell::new(&vm, IoEventAddress::Pio(0x200)).is_ok(),
            statistics: vcpu.as_ref().is_ok_and(|vcpu| ExitCounters::of(vcpu).is_ok()),
            // Each entry is 16 bytes.
            dirty_ring_pages: ring_pages.into_iter().max().unwrap_or(0) / 16,
            kernel_ps_per_instruction: vcpu.ok().and_then(|vcpu| time_kernel(&vm, vcpu).ok().flatten()),
        })
    }

    /// Whether the processor runs the guest's kernel. A KVM without hardware support runs CPL 0 in software, and only
    /// CPL 3 at full speed. None: this could not be tried.
    pub fn is_kernel_native(&self) -> Option<bool> {
        self.kernel_ps_per_instruction.map(|ps| ps <= NATIVE_PS_MAX)
    }
}

/// Runs the loop at CPL 0. None: the guest does not reach the end of the loop.
fn time_kernel(vm: &Arc<VmFd>, mut vcpu: VcpuFd) -> Result<Option<u64>, KvmError> {
    let memory = code()?;
    let _slots = RamSlots::map(vm, &memory, 0)?;
    let mut shortest = Duration::MAX;
    // The first run also maps the pages.
    for _ in 0..3 {
        enter(&vcpu).map_err(KvmError::system("setting a vCPU's registers"))?;
        let started = Instant::now();
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0, _)) => shortest = shortest.min(started.elapsed()),
            _ => return Ok(None),
        }
    }
    let ps = shortest.as_nanos() * 1000 / u128::from(INSTRUCTIONS);
    Ok(u64::try_from(ps).ok())
}

/// A page with the loop.
fn code() -> Result<GuestMemory, KvmError> {
    let [a, b, c, d] = LOOPS.to_le_bytes();
    let code = [0xb9, a, b, c, d, 0x49, 0x75, 0xfd, 0xe6, 0x00, 0xf4];
    let file =
        rustix::fs::memfd_create("kvm-trial", MemfdFlags::CLOEXEC).map_err(KvmError::system("making a memfd"))?;
    rustix::fs::ftruncate(&file, 4096).map_err(KvmError::system("sizing a memfd"))?;
    let file = Arc::new(File::from(file));
    let memory = GuestMemory::new([RegionConfig { gpa: 0, len_bytes: 4096, file, file_offset_bytes: 0 }])?;
    let written = memory.mapped().write_slice(&code, GuestAddress(0));
    written.map_err(|error| KvmError::System { what: "writing a guest's code", source: io::Error::other(error) })?;
    Ok(memory)
}

/// 32-bit protected mode without paging, at the start of the page.
fn enter(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut system = vcpu.get_sregs()?;
    let flat = |segment: &mut kvm_bindings::kvm_segment, type_| {
        (segment.base, segment.limit, segment.g, segment.db, segment.type_) = (0, u32::MAX, 1, 1, type_);
    };
    flat(&mut system.cs, 11);
    system.cs.selector = 8;
    for segment in [&mut system.ds, &mut system.es, &mut system.fs, &mut system.gs, &mut system.ss] {
        flat(segment, 3);
        segment.selector = 16;
    }
    system.cr0 |= 1;
    vcpu.set_sregs(&system)?;
    vcpu.set_regs(&kvm_bindings::kvm_regs { rip: 0, rflags: 2, ..Default::default() })
}
