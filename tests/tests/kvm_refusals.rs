//! The crates refuse what cannot be connected to a virtual machine and name it. Nothing of it remains.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use kvm_ioctls::{IoEventAddress, Kvm};
use ringpass_bare_metal::{Command, RamRegion, map};
use ringpass_broker::kvm::{KvmPlacement, KvmQueue, KvmQueueConfig, RamSlots};
use ringpass_broker::ring::RingConfig;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{KvmGuest, KvmGuestConfig};
use ringpass_tests::needs::Need;
use ringpass_vmm::{Machine, MachineConfig, PROGRAM_SLOT};
use ringpass_workload::Job;

const BLOCKS: u64 = 256;
/// Memory slots that a guest with one region of RAM does not use.
const FREE_SLOT: u32 = 20;

fn main() -> ExitCode {
    let needs = || [Need::kvm(), Need::io_uring(), Need::cpus(2)].into_iter().chain(DiskKind::Ext4PageCache.needs());
    harness::run(vec![
        test("the_refusal_of_an_impossible_queue_names_the_cause_and_leaves_nothing", needs(), queues),
        test("the_refusal_of_overlapping_memory_slots_names_number_and_address", needs(), slots),
        test("the_refusal_of_an_impossible_machine_names_the_cause", needs(), machines),
        test("the_guest_refuses_an_impossible_job_and_says_why", needs(), jobs),
    ])
}

fn guest() -> Result<(TestDisk, KvmGuest)> {
    let disk = TestDisk::new(DiskKind::Ext4PageCache, BLOCKS * 4096)?;
    let guest = KvmGuest::start(KvmGuestConfig::new(disk.config()))?;
    Ok((disk, guest))
}

fn queues() -> Result<()> {
    let (_disk, guest) = guest()?;
    let window = |rings_gpa, sqes_gpa, first_slot| KvmPlacement::Window { rings_gpa, sqes_gpa, first_slot };
    let (rings_gpa, sqes_gpa) = map::window(1);
    let good = || {
        KvmQueueConfig::new(RingConfig { sq_entries: 8, cq_entries: 16 }, window(rings_gpa, sqes_gpa, FREE_SLOT))
            .doorbell(IoEventAddress::Pio(0x250))
            .interrupt_gsi(guest.machine().queue_gsi(0))
    };
    let attach = |config| KvmQueue::attach(guest.machine().vm(), guest.device(), config);
    let refused = |config, beginning: &str, end: &str| -> Result<()> {
        let message = attach(config).map(|_| ()).expect_err("the queue is refused").to_string();
        ensure!(message.starts_with(beginning) && message.ends_with(end), "{message}");
        // The same place works afterwards.
        attach(good())?.detach().wait(Duration::from_secs(10))?;
        Ok(())
    };
    let unaligned = "the window for the rings area at guest-physical 0xe0800001 is not aligned to 4096 bytes";
    refused(good().placement(window(rings_gpa + 1, sqes_gpa, FREE_SLOT)), unaligned, "")?;
    let unaligned = "the window for the SQE area at guest-physical 0xe0c00008 is not aligned to 4096 bytes";
    refused(good().placement(window(rings_gpa, sqes_gpa + 8, FREE_SLOT)), unaligned, "")?;
    // The guest's own queue uses this port.
    refused(
        good().doorbell(IoEventAddress::Pio(map::DOORBELL_PORT.into())),
        "KVM refuses an ioeventfd at port 0x200: File exists",
        "another ioeventfd is there: each queue needs a doorbell of its own",
    )?;
    // A VM without an interrupt controller.
    let bare = Arc::new(ringpass_vmm::create_vm(&Kvm::new()?)?);
    let message =
        KvmQueue::attach(&bare, guest.device(), good()).map(|_| ()).expect_err("the irqfd is refused").to_string();
    let beginning = message.starts_with("KVM refuses an irqfd for interrupt 24: ");
    ensure!(beginning && message.ends_with("the VM needs an interrupt controller in the kernel"), "{message}");
    // The guest's RAM begins at 0.
    refused(
        good().placement(window(rings_gpa, 0, FREE_SLOT)),
        "KVM refuses memory slot 21 (4096 bytes at guest-physical 0x0): File exists",
        "it overlaps another memory slot of the VM",
    )?;
    refused(good().ring(RingConfig { sq_entries: 7, cq_entries: 16 }), "sq_entries is 7: it must be a power of two", "")
}

fn slots() -> Result<()> {
    let (_disk, guest) = guest()?;
    let message = RamSlots::map(guest.machine().vm(), guest.memory(), FREE_SLOT)
        .expect_err("a second mapping of the RAM is refused")
        .to_string();
    let beginning =
        format!("KVM refuses memory slot 20 ({} bytes at guest-physical 0x0): ", guest.memory().len_bytes());
    ensure!(
        message.starts_with(&beginning) && message.ends_with("it overlaps another memory slot of the VM"),
        "{message}"
    );
    Ok(())
}

fn machines() -> Result<()> {
    let kvm = Kvm::new()?;
    let good = || MachineConfig { vcpus: 1, ram: Vec::new(), blocks_max: 16 };
    let refused = |config, wanted: &str| -> Result<()> {
        let message = Machine::new(&kvm, config).map(|_| ()).expect_err("the machine is refused").to_string();
        ensure!(message == wanted, "{message}");
        Ok(())
    };
    refused(MachineConfig { vcpus: 0, ..good() }, "the number of vCPUs is 0: it must be from 1 to 4")?;
    refused(MachineConfig { vcpus: 5, ..good() }, "the number of vCPUs is 5: it must be from 1 to 4")?;
    let blocks = MachineConfig { blocks_max: 1 << 40, ..good() };
    refused(blocks, "blocks_max is 1099511627776: it must be at most 16777216")?;
    let ram = |gpa, len_bytes| MachineConfig { ram: vec![RamRegion { gpa, len_bytes }], ..good() };
    refused(
        ram(map::PROGRAM_GPA - 4096, 8192),
        "guest RAM at 0xbffff000 (8192 bytes) overlaps 3 GiB to 4 GiB, where the machine keeps its program",
    )?;
    refused(
        ram(1 << 32, 1 << 40),
        "the guest's RAM needs more page tables than the machine has room for: at most about 200 GiB can be mapped",
    )?;
    Machine::new(&kvm, ram(0, map::PROGRAM_GPA))?;
    let machine = Machine::new(&kvm, good())?;
    let message = machine.create_vcpu(1).map(|_| ()).expect_err("the second vCPU is refused").to_string();
    ensure!(message == "the number of the vCPU is 1: it must be below the number of vCPUs", "{message}");
    let message = machine.table(0, 17).expect_err("the table is refused").to_string();
    ensure!(message == "the number of blocks is 17: it must be at most MachineConfig::blocks_max", "{message}");
    ensure!(PROGRAM_SLOT != FREE_SLOT);
    Ok(())
}

fn jobs() -> Result<()> {
    let (_disk, mut guest) = guest()?;
    let job = guest.job(0, 4096, 1, BLOCKS);
    let table = guest.table(0, &job)?;
    let mut refused = |command, wanted: &str| -> Result<()> {
        let message = guest.cpus_mut()[0].run(&command).expect_err("the job is refused").to_string();
        ensure!(message == wanted, "{message}");
        Ok(())
    };
    refused(
        Command::Run(job, table),
        "the guest on vCPU 0 refuses: operations and duration_ns are both 0: the run would never end",
    )?;
    let outside = Job { buffers_gpa: 1 << 29, operations: 1, ..job };
    refused(
        Command::Prefill(outside, table),
        "the guest on vCPU 0 refuses: the guest has no memory for a buffer of 4096 bytes at guest-physical 0x20000000",
    )?;
    // The guest still works.
    guest.run_all(&[job], Command::Prefill)?;
    Ok(())
}
