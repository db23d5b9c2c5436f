//! The program of the bare-metal guest. It runs on each vCPU, with a separate block of memory for each.

#![no_std]
#![no_main]

#[macro_use]
mod strings;

mod block;
mod cpu;
mod environment;

use core::fmt::Write;
use core::panic::PanicInfo;
use core::ptr::NonNull;

use block::Block;
use environment::Machine;
use ringpass_bare_metal::{Answer, Attachment, Command, Table, map};
use ringpass_guest_abi::{DriverRing, LayoutError, MappedRing};
use ringpass_workload::{Job, JobError, Report, RingQueue, hostile};

/// The queue for commands.
struct Queue {
    ring: RingQueue<MappedRing>,
    machine: Machine,
}

/// The entry point of a vCPU, on the vCPU's own stack.
#[unsafe(no_mangle)]
extern "C" fn start(block_address: u64) -> ! {
    // SAFETY: the monitor passes the address of this vCPU's block.
    let block = unsafe { Block::at(block_address) };
    let mut queue = None;
    block.answer(&Answer::Ready);
    loop {
        cpu::call();
        let answer = match Command::from_words(&block.command()) {
            Ok(command) => perform(&block, &mut queue, &command),
            Err(error) => refuse(&block, error),
        };
        block.answer(&answer);
    }
}

fn perform(block: &Block, queue: &mut Option<Queue>, command: &Command) -> Answer {
    let work = |queue: &mut Option<Queue>, table: Table, job: &Job, work: Work| {
        let Some(Queue { ring, machine }) = queue else {
            return refuse(block, "no queue is attached");
        };
        // SAFETY: the monitor gives each vCPU its own table, inside the program region and after the blocks.
        let expected = unsafe { table_entries(table) };
        block.clear_histogram();
        match work(job, ring, machine, expected) {
            Ok(report) => Answer::Done(report),
            Err(error) => refuse(block, error),
        }
    };
    match command {
        Command::Attach(attachment) => match attach(block, attachment) {
            Ok(attached) => {
                *queue = Some(attached);
                Answer::Done(Report::default())
            }
            Err(error) => refuse(block, error),
        },
        Command::Prefill(job, table) => work(queue, *table, job, ringpass_workload::prefill),
        Command::Run(job, table) => work(queue, *table, job, ringpass_workload::run),
        Command::VerifyAll(job, table) => work(queue, *table, job, ringpass_workload::verify_all),
        Command::Hostile(attack) => {
            let Some(Queue { ring, machine }) = queue else {
                return refuse(block, "no queue is attached");
            };
            attack.with_target(|target| match hostile::script(target) {
                Ok(steps) => Answer::Attacked(hostile::run_hostile(ring.ring_mut(), machine, steps, attack.timeout_ns)),
                Err(error) => refuse(block, error),
            })
        }
    }
}

type Work = fn(&Job, &mut RingQueue<MappedRing>, &mut Machine, &mut [u64]) -> Result<Report, JobError>;

fn attach(block: &Block, attachment: &Attachment) -> Result<Queue, LayoutError> {
    let layout = attachment.layout;
    // SAFETY: the monitor has placed the ring there, mapped for as long as the virtual machine lives, and no memory of
    // this program is there.
    let memory = unsafe {
        MappedRing::new(
            direct_map(attachment.rings_gpa),
            layout.rings_bytes,
            direct_map(attachment.sqes_gpa),
            layout.sqes_bytes,
        )
    };
    let ring = DriverRing::new(memory, layout)?;
    Ok(Queue { ring: RingQueue::new(ring, attachment.addressing), machine: Machine::new(block.clone(), attachment) })
}

/// The guest-virtual address of a guest-physical address.
fn direct_map(gpa: u64) -> NonNull<u8> {
    NonNull::new((map::DIRECT_MAP_VA + gpa) as *mut u8).expect("the direct map is not at address 0")
}

/// The entries of a job's table.
///
/// # Safety
///
/// The entries are in the program region, and nothing else uses them while the result lives.
unsafe fn table_entries<'a>(table: Table) -> &'a mut [u64] {
    let first = (map::PROGRAM_VA + table.offset_bytes) as *mut u64;
    // SAFETY: mapped memory of this vCPU alone, by the contract; any bits are a `u64`.
    unsafe { core::slice::from_raw_parts_mut(first, table.entries as usize) }
}

fn refuse(block: &Block, why: impl core::fmt::Display) -> Answer {
    // A text that is too long is truncated.
    _ = write!(block.message(), "{why}");
    Answer::Refused
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let block = Block::of_this_cpu();
    _ = write!(block.message(), "{info}");
    block.answer(&Answer::Panicked);
    loop {
        cpu::call();
    }
}
