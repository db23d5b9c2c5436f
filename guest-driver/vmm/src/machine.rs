//! The virtual machine and the memory of its program.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_X86_DISABLE_EXITS, KVM_IRQ_ROUTING_MSI, KVM_X86_DISABLE_EXITS_PAUSE, KvmIrqRouting, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use ringpass_bare_metal::map::{self, offset, vector};
use ringpass_bare_metal::{RamRegion, Table};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::config::{MachineConfig, check};
use crate::{IMAGE, VmmError, state, tables};

/// Memory slot of the program. Every other slot is free.
pub const PROGRAM_SLOT: u32 = 0;
/// The global system interrupt of the first vCPU's queue: the first after the pins of the I/O APIC.
const FIRST_GSI: u32 = 24;
/// The address of the local APICs, to which interrupt messages go.
const MESSAGE_ADDRESS: u32 = 0xfee0_0000;

/// A virtual machine with the bare-metal guest in it. Its vCPUs do not run yet.
#[derive(Debug)]
pub struct Machine {
    inner: Arc<Inner>,
    config: MachineConfig,
    cpuid: kvm_bindings::CpuId,
}

/// The part of the machine that vCPUs need while they run.
#[derive(Debug)]
pub(crate) struct Inner {
    vm: Arc<VmFd>,
    program: GuestMemoryMmap,
}

impl Machine {
    /// Creates the VM, loads the program and builds its tables.
    ///
    /// # Errors
    ///
    /// RAM overlaps the program, a number is out of range, KVM lacks a feature, or a call of KVM fails.
    pub fn new(kvm: &Kvm, config: MachineConfig) -> Result<Self, VmmError> {
        check(&config)?;
        let vm = Arc::new(create_vm(kvm).map_err(VmmError::kvm("creating a VM"))?);
        for (cap, what) in [
            (Cap::Irqchip, "interrupt controller in the kernel (KVM_CAP_IRQCHIP)"),
            (Cap::IrqRouting, "interrupt routing (KVM_CAP_IRQ_ROUTING)"),
            (Cap::GetTscKhz, "frequency of the time stamp counter (KVM_CAP_GET_TSC_KHZ)"),
        ] {
            if !vm.check_extension(cap) {
                return Err(VmmError::Missing { what });
            }
        }
        // On Intel processors without "unrestricted guest" KVM needs three pages of guest-physical address space.
        vm.set_tss_address(0xfffb_d000).map_err(VmmError::kvm("placing KVM's task state"))?;
        vm.create_irq_chip().map_err(VmmError::kvm("creating the interrupt controller"))?;
        let_spin(&vm);
        route_interrupts(&vm, config.vcpus)?;
        let program = load_program(&config)?;
        tables::write(&program, &config)?;
        let inner = Arc::new(Inner { vm, program });
        inner.show_program()?;
        let cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(VmmError::kvm("asking for the processor's features"))?;
        Ok(Self { inner, config, cpuid })
    }

    /// The VM, for memory slots, irqfds and ioeventfds.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.inner.vm
    }

    /// The global system interrupt that interrupts vCPU `cpu` for its queue.
    pub fn queue_gsi(&self, cpu: u32) -> u32 {
        FIRST_GSI + cpu
    }

    /// Creates vCPU number `cpu`, ready to enter the program. [`GuestCpu::start`](crate::GuestCpu::start) runs it.
    pub fn create_vcpu(&self, cpu: u32) -> Result<VcpuFd, VmmError> {
        if cpu >= self.config.vcpus {
            return Err(VmmError::Config {
                what: "the number of the vCPU",
                value: cpu.into(),
                must: "below the number of vCPUs",
            });
        }
        let vcpu = self.inner.vm.create_vcpu(cpu.into()).map_err(VmmError::kvm("creating a vCPU"))?;
        state::set_up(&vcpu, cpu, &self.cpuid)?;
        Ok(vcpu)
    }

    /// The table for jobs of vCPU `cpu` with this many blocks.
    pub fn table(&self, cpu: u32, entries: u64) -> Result<Table, VmmError> {
        if entries > self.config.blocks_max {
            return Err(VmmError::Config {
                what: "the number of blocks",
                value: entries,
                must: "at most MachineConfig::blocks_max",
            });
        }
        Ok(Table { offset_bytes: offset::TABLES + u64::from(cpu) * table_bytes(&self.config), entries })
    }

    /// Writes these entries to the table for jobs of vCPU `cpu`. The vCPU must not be at work.
    pub fn write_table(&self, cpu: u32, entries: &[u64]) -> Result<Table, VmmError> {
        let table = self.table(cpu, entries.len() as u64)?;
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_ne_bytes()).collect();
        self.inner
            .program
            .write_slice(&bytes, GuestAddress(map::PROGRAM_GPA + table.offset_bytes))
            .map_err(VmmError::memory("writing a job's table"))?;
        Ok(table)
    }

    /// Reads the table for jobs of vCPU `cpu`: after a job, the checksum of each of its blocks. The vCPU must not be at
    /// work.
    pub fn read_table(&self, cpu: u32, entries: u64) -> Result<Vec<u64>, VmmError> {
        let table = self.table(cpu, entries)?;
        let mut bytes = vec![[0; 8]; entries as usize];
        self.inner
            .program
            .read_slice(bytes.as_flattened_mut(), GuestAddress(map::PROGRAM_GPA + table.offset_bytes))
            .map_err(VmmError::memory("reading a job's table"))?;
        Ok(bytes.into_iter().map(u64::from_ne_bytes).collect())
    }

    /// The regions of RAM that the guest learns.
    pub fn ram(&self) -> &[RamRegion] {
        &self.config.ram
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}

impl Inner {
    pub(crate) fn program(&self) -> &GuestMemoryMmap {
        &self.program
    }

    fn show_program(&self) -> Result<(), VmmError> {
        let region = self.program.iter().next().expect("the program has one region");
        let address = region.get_host_address(vm_memory::MemoryRegionAddress(0));
        let host = address.map_err(VmmError::memory("looking up the program's memory"))?;
        let slot = kvm_userspace_memory_region {
            slot: PROGRAM_SLOT,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the mapping lives until the slot is gone (`drop`).
        unsafe { self.vm.set_user_memory_region(slot) }.map_err(VmmError::kvm("making the program's memory slot"))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let slot = kvm_userspace_memory_region { slot: PROGRAM_SLOT, ..Default::default() };
        // SAFETY: a size of 0 removes the slot.
        if let Err(error) = unsafe { self.vm.set_user_memory_region(slot) } {
            // No vCPU runs any more (each holds a reference to this value), so no guest can access memory through the
            // slot.
            tracing::debug!(%error, "cannot remove the program's memory slot");
        }
    }
}

/// Creates a VM. KVM fails with `EINTR` if anything is pending for the thread, for example work of one of its rings: then this
/// function tries again.
///
/// # Errors
///
/// KVM refuses for another reason.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == nix::libc::EINTR => {}
            other => return other,
        }
    }
}

fn table_bytes(config: &MachineConfig) -> u64 {
    (config.blocks_max * 8).next_multiple_of(4096)
}

/// The program's memory, with the image in it.
fn load_program(config: &MachineConfig) -> Result<GuestMemoryMmap, VmmError> {
    let len_bytes = (offset::TABLES + u64::from(config.vcpus) * table_bytes(config)).next_multiple_of(2 << 20);
    let start = GuestAddress(map::PROGRAM_GPA);
    let program = GuestMemoryMmap::from_ranges(&[(start, len_bytes as usize)])
        .map_err(VmmError::memory("allocating the program's memory"))?;
    program.write_slice(IMAGE, start).map_err(VmmError::memory("loading the program"))?;
    Ok(program)
}

/// Asks KVM, if it can, not to take out a vCPU that executes PAUSE in a loop, because a polling guest does that.
fn let_spin(vm: &VmFd) {
    let can = vm.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into());
    if can & KVM_X86_DISABLE_EXITS_PAUSE as i32 != 0 {
        let cap = kvm_enable_cap {
            cap: KVM_CAP_X86_DISABLE_EXITS,
            args: [KVM_X86_DISABLE_EXITS_PAUSE.into(), 0, 0, 0],
            ..Default::default()
        };
        if let Err(error) = vm.enable_cap(&cap) {
            tracing::debug!(%error, "PAUSE loops still leave the guest");
        }
    }
}

/// Routes one message for each vCPU, as with MSI-X: edge-triggered, directly to the local APIC.
fn route_interrupts(vm: &VmFd, vcpus: u32) -> Result<(), VmmError> {
    let entries: Vec<_> = (0..vcpus)
        .map(|cpu| kvm_irq_routing_entry {
            gsi: FIRST_GSI + cpu,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: MESSAGE_ADDRESS | cpu << 12,
                    address_hi: 0,
                    data: vector::QUEUE.into(),
                    __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1::default(),
                },
            },
            ..Default::default()
        })
        .collect();
    let routing = KvmIrqRouting::from_entries(&entries).map_err(VmmError::memory("listing interrupt routes"))?;
    vm.set_gsi_routing(&routing).map_err(VmmError::kvm("routing interrupts"))
}
