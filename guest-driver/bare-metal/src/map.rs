//! The memory map of the virtual machine.
//!
//! The host chooses the guest's RAM. The program is in a region of its own beside the RAM, which is never registered
//! for I/O, where a PC has its hole for devices:
//!
//! | guest-physical | content |
//! | --- | --- |
//! | `PROGRAM_GPA` (3 GiB) | the program, its tables, stacks and mailboxes |
//! | `WINDOW_GPA` (3.5 GiB) | windows onto rings that the host kernel allocated, `WINDOW_STRIDE_BYTES` each |
//! | `DOORBELL_GPA` | MMIO doorbells, one page each, backed only by ioeventfds |
//!
//! The guest sees the program at `PROGRAM_VA`, and every guest-physical address at `DIRECT_MAP_VA` + address.

/// Guest-physical address of the program region. RAM must leave 3 GiB to 4 GiB free.
pub const PROGRAM_GPA: u64 = 0xc000_0000;
/// Guest-virtual address of the program region.
pub const PROGRAM_VA: u64 = 0x20_0000;
/// Guest-virtual address of guest-physical address 0.
pub const DIRECT_MAP_VA: u64 = 0x4000_0000_0000;
/// Length of the direct map of guest-physical addresses, up to the end of CPL 3's half of the address space: 64 TiB.
pub const DIRECT_MAP_BYTES: u64 = (1 << 47) - DIRECT_MAP_VA;
/// Guest-physical address of the first window.
pub const WINDOW_GPA: u64 = 0xe000_0000;
/// Distance of two windows: the rings area is at the start, the SQE area in the middle. The largest ring of io_uring
/// fits.
pub const WINDOW_STRIDE_BYTES: u64 = 8 << 20;
/// Guest-physical address of the first MMIO doorbell.
pub const DOORBELL_GPA: u64 = 0xf800_0000;
/// The end of the addresses that the program, windows and doorbells may use.
pub const RESERVED_END_GPA: u64 = 1 << 32;

/// Maximum number of vCPUs.
pub const VCPUS_MAX: u32 = 4;

/// Parts of the program region, in bytes from its start. The image comes first.
pub mod offset {
    /// Global descriptor table.
    pub const GDT: u64 = 0x10_0000;
    /// Interrupt descriptor table.
    pub const IDT: u64 = 0x10_1000;
    /// Page tables, the root first.
    pub const PAGE_TABLES: u64 = 0x10_2000;
    /// End of the page tables.
    pub const PAGE_TABLES_END: u64 = 0x20_0000;
    /// The first vCPU's block, see [`block`](super::block).
    pub const BLOCKS: u64 = PAGE_TABLES_END;
    /// Distance of two vCPUs' blocks.
    pub const BLOCK_STRIDE: u64 = 0x8_0000;
    /// Tables of expected block contents. Their length depends on the configuration of the machine.
    pub const TABLES: u64 = BLOCKS + BLOCK_STRIDE * super::VCPUS_MAX as u64;
}

/// Parts of a vCPU's block, in bytes from its start.
pub mod block {
    /// `u8`, not 0: the queue's interrupt has come. GS points here, so the handlers find their vCPU's block.
    pub const INTERRUPTED: usize = 0;
    /// `u8`, not 0: the timer runs.
    pub const TIMER_ARMED: usize = 1;
    /// `u64`: the block's own address.
    pub const OWN_ADDRESS: usize = 8;
    /// [`Command`](crate::Command), as words.
    pub const COMMAND: usize = 0x100;
    /// [`Answer`](crate::Answer), as words.
    pub const ANSWER: usize = 0x500;
    /// Text of an answer.
    pub const MESSAGE: usize = 0x900;
    /// The task state segment with its I/O permission bitmap.
    pub const TASK_STATE: usize = 0x1000;
    /// Top of the stack at CPL 0.
    pub const HANDLER_STACK_TOP: usize = 0x4000;
    /// The latency [`Histogram`](crate::Histogram): `u64` counts.
    pub const HISTOGRAM: usize = 0x4000;
    /// Top of the stack at CPL 3, 256 KiB.
    pub const STACK_TOP: usize = super::offset::BLOCK_STRIDE as usize;
}

/// The header at the start of the image, as `u64`s.
pub mod header {
    /// Identifies the program.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"ringpass");
    /// Number of words: magic, then the addresses of the entry, of the handlers, and of the idle call, in that order.
    pub const WORDS: usize = 5;
}

/// Interrupt vectors.
pub mod vector {
    /// The queue's completions.
    pub const QUEUE: u8 = 0x40;
    /// The local APIC's timer.
    pub const TIMER: u8 = 0x41;
    /// The idle call: `int3` from CPL 3. A breakpoint is the only software interrupt that a KVM which runs the guest's
    /// CPL 0 in software can deliver (`int n` becomes a general protection fault there).
    pub const IDLE: u8 = 3;
}

/// Ports that CPL 3 may use: the I/O permission bitmap covers `0..PORTS`.
pub const PORTS: u16 = 0x400;
/// A write to this port takes a vCPU out of the guest when a command is done.
pub const CALL_PORT: u16 = 0x300;
/// The first port doorbell; one port each.
pub const DOORBELL_PORT: u16 = 0x200;

/// Interval at which an idle vCPU checks whether it has waited long enough: the timer's initial count.
///
/// KVM's local APIC counts nanoseconds, here divided by 128: the interval is 128 ms.
pub const IDLE_TICK_COUNT: u32 = 1_000_000;

/// The guest-physical addresses of window number `index`: of its rings area and its SQE area.
pub const fn window(index: u32) -> (u64, u64) {
    let rings_gpa = WINDOW_GPA + index as u64 * WINDOW_STRIDE_BYTES;
    (rings_gpa, rings_gpa + WINDOW_STRIDE_BYTES / 2)
}
