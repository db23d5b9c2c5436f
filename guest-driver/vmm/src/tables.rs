//! The tables that the processor reads from memory: page tables, descriptor tables, task states.

use ringpass_bare_metal::map::{self, block, offset, vector};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{MachineConfig, VmmError};

/// Segment selectors of the program.
pub(crate) mod selector {
    /// Code at CPL 0: the handlers.
    pub(crate) const KERNEL_CODE: u16 = 0x08;
    /// Data at CPL 3.
    pub(crate) const USER_DATA: u16 = 0x18 | 3;
    /// Code at CPL 3: the program.
    pub(crate) const USER_CODE: u16 = 0x20 | 3;

    /// The task state of a vCPU.
    pub(crate) fn task_state(cpu: u32) -> u16 {
        0x28 + 16 * cpu as u16
    }
}

const PAGE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// Present, writable, accessible for CPL 3.
const TABLE: u64 = 0b111;
/// The same for a 2 MiB page; already accessed and dirty, so that the processor does not need to set these bits.
const LARGE_PAGE: u64 = TABLE | 1 << 5 | 1 << 6 | 1 << 7;

/// Bytes of a task state segment without its I/O permission bitmap (Intel SDM vol. 3, 8.7).
const TASK_STATE_BYTES: u16 = 104;
/// The task state with the bitmap, and the byte of ones that the processor requires after it.
pub(crate) const TASK_STATE_LIMIT: u32 = (TASK_STATE_BYTES + map::PORTS / 8) as u32;

/// The guest-virtual address of a part of the program region.
pub(crate) fn program_va(offset_bytes: u64) -> u64 {
    map::PROGRAM_VA + offset_bytes
}

/// A vCPU's block, in bytes from the start of the program region.
pub(crate) fn block_offset(cpu: u32) -> u64 {
    offset::BLOCKS + u64::from(cpu) * offset::BLOCK_STRIDE
}

/// Guest-physical address of the root page table.
pub(crate) const ROOT_GPA: u64 = map::PROGRAM_GPA + offset::PAGE_TABLES;

/// The words at the start of the image.
pub(crate) fn header() -> [u64; map::header::WORDS] {
    std::array::from_fn(|index| {
        let bytes = crate::IMAGE[index * 8..][..8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    })
}

/// Writes all tables into the program's memory.
pub(crate) fn write(program: &GuestMemoryMmap, config: &MachineConfig) -> Result<(), VmmError> {
    let memory = Memory(program);
    write_descriptors(&memory, config.vcpus)?;
    for cpu in 0..config.vcpus {
        write_block(&memory, cpu)?;
    }
    let program_bytes = vm_memory::GuestMemoryBackend::last_addr(program).0 + 1 - map::PROGRAM_GPA;
    write_page_tables(&memory, config, program_bytes)
}

/// The program's memory by offset.
struct Memory<'a>(&'a GuestMemoryMmap);

impl Memory<'_> {
    fn write(&self, offset_bytes: u64, value: u64) -> Result<(), VmmError> {
        self.0
            .write_obj(value, GuestAddress(map::PROGRAM_GPA + offset_bytes))
            .map_err(VmmError::memory("writing the program's tables"))
    }

    fn read(&self, offset_bytes: u64) -> Result<u64, VmmError> {
        self.0
            .read_obj(GuestAddress(map::PROGRAM_GPA + offset_bytes))
            .map_err(VmmError::memory("reading the program's tables"))
    }
}

fn write_descriptors(memory: &Memory<'_>, vcpus: u32) -> Result<(), VmmError> {
    let [_magic, _entry, queue, timer, idle] = header();
    // Type, "not a system segment", privilege level, present, long mode: the only bits that count in 64-bit mode.
    let segments: [u64; 5] = [
        0,
        0x00af_9b00_0000_ffff, // KERNEL_CODE
        0x00cf_9300_0000_ffff, // data at CPL 0: not used, SS is null in handlers
        0x00cf_f300_0000_ffff, // USER_DATA
        0x00af_fb00_0000_ffff, // USER_CODE
    ];
    for (index, descriptor) in segments.into_iter().enumerate() {
        memory.write(offset::GDT + 8 * index as u64, descriptor)?;
    }
    for cpu in 0..vcpus {
        let base = program_va(block_offset(cpu) + block::TASK_STATE as u64);
        let limit = u64::from(TASK_STATE_LIMIT);
        // Present, a busy 64-bit task state.
        let low = limit | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56;
        let at = offset::GDT + u64::from(selector::task_state(cpu));
        memory.write(at, low)?;
        memory.write(at + 8, base >> 32)?;
    }
    for (vector, handler, privilege) in [(vector::QUEUE, queue, 0), (vector::TIMER, timer, 0), (vector::IDLE, idle, 3)]
    {
        // An interrupt gate: present, the minimum privilege level, interrupts off.
        let kind = 0x8e | privilege << 5;
        let low =
            handler & 0xffff | u64::from(selector::KERNEL_CODE) << 16 | kind << 40 | (handler >> 16 & 0xffff) << 48;
        memory.write(offset::IDT + 16 * u64::from(vector), low)?;
        memory.write(offset::IDT + 16 * u64::from(vector) + 8, handler >> 32)?;
    }
    Ok(())
}

/// Writes a vCPU's own address and its task state: the stack for handlers, and the ports that CPL 3 may use (all ports
/// of the bitmap, because a cleared bit permits a port).
fn write_block(memory: &Memory<'_>, cpu: u32) -> Result<(), VmmError> {
    let start = block_offset(cpu);
    memory.write(start + block::OWN_ADDRESS as u64, program_va(start))?;
    let task_state = start + block::TASK_STATE as u64;
    let stack = program_va(start + block::HANDLER_STACK_TOP as u64);
    // RSP0 is at byte 4, the bitmap's offset at byte 102.
    memory.write(task_state, stack << 32)?;
    memory.write(task_state + 8, stack >> 32)?;
    memory.write(task_state + 96, u64::from(TASK_STATE_BYTES) << 48)?;
    memory.write(task_state + u64::from(TASK_STATE_BYTES + map::PORTS / 8), 0xff)
}

/// Builds the page tables: the program at its virtual address, and all guest-physical addresses in the direct map.
fn write_page_tables(memory: &Memory<'_>, config: &MachineConfig, program_bytes: u64) -> Result<(), VmmError> {
    let mut tables = PageTables { memory, next: offset::PAGE_TABLES + PAGE_BYTES };
    for offset_bytes in (0..program_bytes).step_by(LARGE_PAGE_BYTES as usize) {
        tables.map_large(map::PROGRAM_VA + offset_bytes, map::PROGRAM_GPA + offset_bytes)?;
    }
    tables.map_gib(map::PROGRAM_GPA)?;
    for region in config.ram.iter().filter(|region| region.len_bytes != 0) {
        let first = region.gpa / GIB;
        for gib in first..=(region.gpa + region.len_bytes - 1) / GIB {
            tables.map_gib(gib * GIB)?;
        }
    }
    Ok(())
}

struct PageTables<'a> {
    memory: &'a Memory<'a>,
    /// The next free table.
    next: u64,
}

impl PageTables<'_> {
    /// Maps a gibibyte in the direct map.
    fn map_gib(&mut self, gpa: u64) -> Result<(), VmmError> {
        for offset_bytes in (0..GIB).step_by(LARGE_PAGE_BYTES as usize) {
            self.map_large(map::DIRECT_MAP_VA + gpa + offset_bytes, gpa + offset_bytes)?;
        }
        Ok(())
    }

    fn map_large(&mut self, va: u64, gpa: u64) -> Result<(), VmmError> {
        let index = |shift: u32| 8 * (va >> shift & 0x1ff);
        let level3 = self.below(offset::PAGE_TABLES + index(39))?;
        let level2 = self.below(level3 + index(30))?;
        self.memory.write(level2 + index(21), gpa | LARGE_PAGE)
    }

    /// The table that an entry points to; a new table if the entry is empty.
    fn below(&mut self, entry: u64) -> Result<u64, VmmError> {
        let found = self.memory.read(entry)?;
        if found != 0 {
            return Ok((found & !(PAGE_BYTES - 1)) - map::PROGRAM_GPA);
        }
        let table = self.next;
        if table + PAGE_BYTES > offset::PAGE_TABLES_END {
            return Err(VmmError::PageTables);
        }
        self.next += PAGE_BYTES;
        self.memory.write(entry, (map::PROGRAM_GPA + table) | TABLE)?;
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_program_starts_with_its_header() {
        let [magic, addresses @ ..] = header();
        assert_eq!(magic, map::header::MAGIC);
        let image = map::PROGRAM_VA..map::PROGRAM_VA + crate::IMAGE.len() as u64;
        assert!(addresses.iter().all(|address| image.contains(address)), "{addresses:x?}");
    }
}
