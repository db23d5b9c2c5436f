//! A KVM virtual machine as a guest.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use kvm_ioctls::{IoEventAddress, Kvm};
use ringpass_bare_metal::{Attachment, Bell, Command, RAM_REGIONS_MAX, RamRegion, Table, map};
use ringpass_broker::direct::{DirectConfig, DirectDevice, SubmissionConfig};
use ringpass_broker::disk::Disk;
use ringpass_broker::kernel;
use ringpass_broker::kvm::{ExitCounters, KvmPlacement, KvmQueue, KvmQueueConfig, RamSlots};
use ringpass_broker::memory::{GuestMemory, RegionConfig, Sharing};
use ringpass_broker::ring::{RingConfig, SqThreadConfig};
use ringpass_guest_abi::{rings_area_bytes, sqes_area_bytes};
use ringpass_restrictions::{Access, RegisterOperation};
use ringpass_vmm::{GuestCpu, Machine, MachineConfig, PROGRAM_SLOT};
use ringpass_workload::{Job, Wait};
use rustix::fs::MemfdFlags;

use super::{BUFFERS_BYTES, DemoWay, ExitCounts, Outcome, SQ_THREAD_IDLE, Task};
use crate::chosen_policy::ChosenPolicy;

const RING: RingConfig = RingConfig { sq_entries: 64, cq_entries: 128 };
/// Size of the guest's RAM. It is small because the demo pins it, and an ordinary user may pin 8 MiB in total.
const RAM_BYTES: u64 = 1 << 20;
/// The guest's one vCPU.
const CPU: u32 = 0;
/// Time-out for the end of the ring.
const END: Duration = Duration::from_secs(10);

/// How guest and host signal requests and completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// No signals: the SQ thread polls, and the guest polls.
    Poll,
    /// The SQ thread polls, and each completion interrupts the guest.
    Interrupt,
    /// The guest rings a doorbell for the broker and polls for completions.
    Kick,
}

impl Signal {
    /// The way's name in the report.
    pub(crate) fn way(self) -> &'static str {
        match self {
            Self::Poll => "kvm-poll",
            Self::Interrupt => "kvm-irq",
            Self::Kick => "kvm-kick",
        }
    }
}

/// A virtual machine with its own ring, and the broker's side.
///
/// The fields are in the order of their drop: the vCPU, the queue, then what these two used.
pub(crate) struct KvmWay {
    signal: Signal,
    cpu: Option<GuestCpu>,
    queue: Option<KvmQueue>,
    exits: ExitCounters,
    table: Table,
    buffers_gpa: u64,
    _ram: RamSlots,
    _device: DirectDevice,
}

impl KvmWay {
    /// Starts a virtual machine on `disk`. `expected` are the checksums of the blocks of its area.
    pub(crate) fn start(
        disk: &Arc<Disk>,
        policy: ChosenPolicy,
        signal: Signal,
        expected: &[u64],
    ) -> anyhow::Result<Self> {
        let kvm = Kvm::new().context("cannot open /dev/kvm (the user must be root or in the group `kvm`)")?;
        let (rings_gpa, sqes_gpa) = (0, rings_area_bytes(RING.cq_entries));
        let buffers_gpa = sqes_gpa + sqes_area_bytes(RING.sq_entries);
        assert!(buffers_gpa + BUFFERS_BYTES <= RAM_BYTES, "the RAM is large enough");
        let memory = memory()?;
        let device = device(disk, &memory, policy, signal)?;

        let ram = RamRegion { gpa: 0, len_bytes: RAM_BYTES };
        let config = MachineConfig { vcpus: 1, ram: vec![ram], blocks_max: expected.len() as u64 };
        let machine = Machine::new(&kvm, config)?;
        let ram_slots = RamSlots::map(machine.vm(), &memory, PROGRAM_SLOT + 1)?;
        let vcpu = machine.create_vcpu(CPU)?;
        let exits = ExitCounters::of(&vcpu)?;
        let mut cpu = GuestCpu::start(&machine, CPU, vcpu)?;

        let port = map::DOORBELL_PORT;
        let queue = KvmQueue::attach(
            machine.vm(),
            &device,
            KvmQueueConfig::new(RING, KvmPlacement::GuestRam { rings_gpa, sqes_gpa })
                .doorbell(IoEventAddress::Pio(port.into()))
                .interrupt_gsi(machine.queue_gsi(CPU)),
        )?;
        let mut regions = [RamRegion::default(); RAM_REGIONS_MAX];
        regions[0] = ram;
        let attachment = Attachment {
            rings_gpa,
            sqes_gpa,
            layout: *queue.layout(),
            addressing: queue.addressing(),
            bell: Bell::Port(port),
            ram: regions,
            tick_rate: cpu.tick_rate(),
        };
        cpu.run(&Command::Attach(attachment))?;
        let table = machine.write_table(CPU, expected)?;
        Ok(Self {
            signal,
            cpu: Some(cpu),
            queue: Some(queue),
            exits,
            table,
            buffers_gpa,
            _ram: ram_slots,
            _device: device,
        })
    }
}

impl DemoWay for KvmWay {
    fn name(&self) -> &'static str {
        self.signal.way()
    }

    fn perform(&mut self, task: Task) -> anyhow::Result<Outcome> {
        let wait = if self.signal == Signal::Interrupt { Wait::Interrupt } else { Wait::Poll };
        let job = Job { buffers_gpa: self.buffers_gpa, wait, ..task.job };
        let work = if task.prefill { Command::Prefill } else { Command::Run };
        let before = self.exits.read()?;
        let cpu = self.cpu.as_mut().context("the guest has been stopped")?;
        let outcome = cpu.run(&work(job, self.table))?;
        let exits = self.exits.read()? - before;
        let exits = ExitCounts { all: exits.all, requested: exits.requested() };
        Ok(Outcome { report: outcome.report, latencies: outcome.latencies, exits: Some(exits) })
    }
}

impl Drop for KvmWay {
    fn drop(&mut self) {
        drop(self.cpu.take());
        if let Some(Err(error)) = self.queue.take().map(|queue| KvmQueue::detach(queue).wait(END)) {
            tracing::warn!("{error}");
        }
    }
}

fn memory() -> anyhow::Result<GuestMemory> {
    let file = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC).context("cannot make the guest's RAM")?;
    rustix::fs::ftruncate(&file, RAM_BYTES).context("cannot make the guest's RAM")?;
    let file = Arc::new(File::from(file));
    Ok(GuestMemory::new([RegionConfig { gpa: 0, len_bytes: RAM_BYTES, file, file_offset_bytes: 0 }])?)
}

fn device(
    disk: &Arc<Disk>,
    memory: &GuestMemory,
    policy: ChosenPolicy,
    signal: Signal,
) -> anyhow::Result<DirectDevice> {
    let support = kernel::support().context("cannot ask the kernel what its io_uring can do")?;
    let access = if disk.is_read_only() { Access::ReadOnly } else { Access::ReadWrite };
    let can_clone = support.register_operations.contains(RegisterOperation::REGISTER_CLONE_BUFFERS);
    let submission = match signal {
        Signal::Poll | Signal::Interrupt => SubmissionConfig::SqThread(SqThreadConfig::new(SQ_THREAD_IDLE)),
        Signal::Kick => SubmissionConfig::Doorbell,
    };
    let sharing = if can_clone { Sharing::Clone } else { Sharing::PinAgain };
    let config = DirectConfig::new(submission, sharing);
    let policy = policy.compile(access, &support)?;
    Ok(DirectDevice::new(disk.clone(), memory, policy, config)?)
}
