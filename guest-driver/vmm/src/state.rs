//! The state in which a vCPU enters the program: 64-bit mode, CPL 3, interrupts on.

use kvm_bindings::{CpuId, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use ringpass_bare_metal::map::{block, offset, vector};

use crate::VmmError;
use crate::tables::{ROOT_GPA, TASK_STATE_LIMIT, block_offset, header, program_va, selector};

// Control registers (Intel SDM vol. 3, 2.5).
const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The local APIC on, in x2APIC mode: its registers are MSRs.
const APIC_BASE_X2APIC: u64 = 1 << 10;
const APIC_BASE_ENABLED: u64 = 1 << 11;

const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_IF: u64 = 1 << 9;

// Registers of the local APIC, by their offset in its page.
const APIC_SPURIOUS: usize = 0xf0;
const APIC_TIMER: usize = 0x320;
const APIC_TIMER_DIVIDE: usize = 0x3e0;
const APIC_SPURIOUS_ENABLED: u32 = 1 << 8;
/// Divide by 128.
const APIC_DIVIDE_128: u32 = 0b1010;

/// Sets the registers of `vcpu`, number `cpu` of the machine, for the program's entry.
pub(crate) fn set_up(vcpu: &VcpuFd, cpu: u32, features: &CpuId) -> Result<(), VmmError> {
    set_features(vcpu, cpu, features)?;
    set_system_registers(vcpu, cpu)?;
    set_local_apic(vcpu)?;
    // Otherwise all vCPUs but the first would wait until the first starts them.
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(VmmError::kvm("letting a vCPU run"))?;
    let [_magic, entry, ..] = header();
    let block = program_va(block_offset(cpu));
    let registers = kvm_regs {
        rip: entry,
        rflags: RFLAGS_FIXED | RFLAGS_IF,
        // As after a call: 8 below a multiple of 16.
        rsp: block + block::STACK_TOP as u64 - 8,
        rdi: block,
        ..Default::default()
    };
    vcpu.set_regs(&registers).map_err(VmmError::kvm("setting a vCPU's registers"))
}

/// Gives the vCPU the features of the host's processor, with its own APIC ID.
fn set_features(vcpu: &VcpuFd, cpu: u32, features: &CpuId) -> Result<(), VmmError> {
    let mut features = features.clone();
    for entry in features.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | cpu << 24,
            0xb | 0x1f => entry.edx = cpu,
            _ => {}
        }
    }
    vcpu.set_cpuid2(&features).map_err(VmmError::kvm("setting a vCPU's features"))
}

fn set_system_registers(vcpu: &VcpuFd, cpu: u32) -> Result<(), VmmError> {
    let mut registers = vcpu.get_sregs().map_err(VmmError::kvm("reading a vCPU's system registers"))?;
    let code = kvm_segment {
        selector: selector::USER_CODE,
        base: 0,
        limit: u32::MAX,
        type_: 11,
        present: 1,
        dpl: 3,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: selector::USER_DATA, type_: 3, db: 1, l: 0, ..code };
    let block = program_va(block_offset(cpu));
    registers.cs = code;
    (registers.ss, registers.ds, registers.es, registers.fs) = (data, data, data, data);
    registers.gs = kvm_segment { base: block, ..data };
    registers.tr = kvm_segment {
        selector: selector::task_state(cpu),
        base: block + block::TASK_STATE as u64,
        limit: TASK_STATE_LIMIT,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    registers.gdt.base = program_va(offset::GDT);
    registers.gdt.limit = 0xfff;
    registers.idt.base = program_va(offset::IDT);
    registers.idt.limit = 0xfff;
    registers.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    registers.cr3 = ROOT_GPA;
    registers.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    registers.efer = EFER_LME | EFER_LMA;
    registers.apic_base |= APIC_BASE_ENABLED | APIC_BASE_X2APIC;
    vcpu.set_sregs(&registers).map_err(VmmError::kvm("setting a vCPU's system registers"))
}

/// Sets up the local APIC: it accepts interrupts, and its timer counts down once, in units of 128 ns.
fn set_local_apic(vcpu: &VcpuFd) -> Result<(), VmmError> {
    let mut apic = vcpu.get_lapic().map_err(VmmError::kvm("reading a vCPU's local APIC"))?;
    let registers = [
        (APIC_SPURIOUS, APIC_SPURIOUS_ENABLED | 0xff),
        (APIC_TIMER, u32::from(vector::TIMER)),
        (APIC_TIMER_DIVIDE, APIC_DIVIDE_128),
    ];
    for (register, value) in registers {
        let bytes = value.to_le_bytes().map(|byte| byte as i8);
        apic.regs[register..register + 4].copy_from_slice(&bytes);
    }
    vcpu.set_lapic(&apic).map_err(VmmError::kvm("setting a vCPU's local APIC"))
}
