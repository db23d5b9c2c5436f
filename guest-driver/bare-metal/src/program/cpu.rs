//! Access to the processor that Rust cannot express. All assembly code is here and in `strings.rs`.

use core::arch::{asm, global_asm};

use ringpass_bare_metal::map::{CALL_PORT, IDLE_TICK_COUNT, block, header};

// The header of the image, and all code that runs at CPL 0.
//
// The handlers change only registers that they save, because they interrupt Rust code at any point. The processor
// switches the stack (TSS.RSP0), so the red zone below the interrupted stack does not change. GS points to the vCPU's
// block at both privilege levels. The local APIC is in x2APIC mode: MSR 0x80b is its end-of-interrupt register, 0x838
// its timer's initial count.
//
// The idle call checks the interrupt flag with interrupts off (it goes through an interrupt gate), and STI takes effect
// only after the start of HLT: an interrupt in between ends the HLT. The idle call does not restart a running timer.
global_asm!(
    ".pushsection .header, \"a\", @progbits",
    ".quad {magic}, start, queue_interrupt, timer_interrupt, idle_call",
    ".popsection",
    "",
    "queue_interrupt:",
    "    mov byte ptr gs:[{interrupted}], 1",
    "    jmp end_of_interrupt",
    "",
    "timer_interrupt:",
    "    mov byte ptr gs:[{timer_armed}], 0",
    "end_of_interrupt:",
    "    push rax",
    "    push rcx",
    "    push rdx",
    "    xor eax, eax",
    "    xor edx, edx",
    "    mov ecx, 0x80b",
    "    wrmsr",
    "    pop rdx",
    "    pop rcx",
    "    pop rax",
    "    iretq",
    "",
    "idle_call:",
    "    cmp byte ptr gs:[{interrupted}], 0",
    "    jne 2f",
    "    cmp byte ptr gs:[{timer_armed}], 0",
    "    jne 1f",
    "    mov byte ptr gs:[{timer_armed}], 1",
    "    mov eax, {idle_tick_count}",
    "    xor edx, edx",
    "    mov ecx, 0x838",
    "    wrmsr",
    "1:  sti",
    "    hlt",
    "2:  iretq",
    magic = const header::MAGIC,
    interrupted = const block::INTERRUPTED,
    timer_armed = const block::TIMER_ARMED,
    idle_tick_count = const IDLE_TICK_COUNT,
);

string_functions!("");

/// Leaves the guest until the monitor continues it. Memory may have changed afterwards.
pub(crate) fn call() {
    write_port(CALL_PORT);
}

/// Writes a byte to a port.
pub(crate) fn write_port(port: u16) {
    // SAFETY: the I/O permission bitmap permits the port for CPL 3. The write can change this program's memory only
    // through the monitor; therefore the assembly block is declared as one that writes memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") 1u8, options(nostack, preserves_flags)) }
}

/// Sleeps until an interrupt comes, unless the queue's interrupt has come since the flag was last taken.
pub(crate) fn idle() {
    // SAFETY: the handler (`vector::IDLE`) changes these registers and nothing else.
    unsafe { asm!("int3", out("rax") _, out("rcx") _, out("rdx") _, options(nostack)) }
}

/// Reads the time stamp counter after all earlier instructions in program order.
#[inline]
pub(crate) fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has it.
    unsafe { core::arch::x86_64::_mm_lfence() };
    // SAFETY: CR4.TSD is clear, so that CPL 3 may read the counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The address of this vCPU's block.
pub(crate) fn own_block() -> u64 {
    let address;
    // SAFETY: GS points to the block, which holds its own address.
    unsafe {
        asm!("mov {}, gs:[{own}]", out(reg) address, own = const block::OWN_ADDRESS, options(nostack, preserves_flags));
    }
    address
}
