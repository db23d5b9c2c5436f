//! A bare-metal guest on KVM with a device of the broker. This module does what a monitor does.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvm_ioctls::{IoEventAddress, Kvm};
use ringpass_bare_metal::{Attachment, Bell, Command, RAM_REGIONS_MAX, RamRegion, Table, map};
use ringpass_broker::direct::{DirectConfig, DirectDevice, SubmissionConfig};
use ringpass_broker::disk::{Disk, DiskConfig, LogicalBlock};
use ringpass_broker::kernel;
use ringpass_broker::kvm::{ExitCounters, KvmPlacement, KvmQueue, KvmQueueConfig, RamSlots};
use ringpass_broker::memory::{GuestMemory, RegionConfig, Sharing};
use ringpass_broker::ring::{RingConfig, RingEnd, SqThreadConfig};
use ringpass_guest_abi::{FixedAddressing, RingLayout, rings_area_bytes, sqes_area_bytes};
use ringpass_restrictions::{Access, Policy};
use ringpass_vmm::{GuestCpu, Machine, MachineConfig, Outcome, PROGRAM_SLOT};
use ringpass_workload::{Job, Verify, Wait};
use rustix::fs::MemfdFlags;

use crate::process_guest::Place;

/// How a guest rings its doorbells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BellKind {
    /// Port I/O.
    Port,
    /// A write to an address without memory.
    Mmio,
}

/// The configuration of a guest.
#[derive(Clone, Debug)]
pub struct KvmGuestConfig {
    /// Its disk.
    pub disk: DiskConfig,
    /// Size of each ring.
    pub ring: RingConfig,
    /// The place of the rings.
    pub place: Place,
    /// The number of queues, 1 to 4. Each has a vCPU.
    pub queues: u32,
    /// Who consumes the SQs.
    pub submission: SubmissionConfig,
    /// How the guest rings its doorbells.
    pub bell: BellKind,
    /// Whether completions interrupt the guest.
    pub interrupts: bool,
    /// Bytes of buffers for each queue.
    pub buffer_bytes: u64,
    /// The most blocks of a queue's job.
    pub blocks_max: u64,
    /// A second region of RAM, of 1 MiB, behind a hole of 1 MiB.
    pub hole: bool,
    /// The policy of the rings, which need not be safe. `None`: the built-in policy.
    pub policy: Option<Policy>,
}

/// Length of the hole and of the region behind it.
const HOLE_BYTES: u64 = 1 << 20;

impl KvmGuestConfig {
    /// One polling queue of 64 entries in guest RAM, with an SQ thread that sleeps after 10 ms, and 1 MiB for buffers.
    pub fn new(disk: DiskConfig) -> Self {
        Self {
            disk,
            ring: RingConfig { sq_entries: 64, cq_entries: 128 },
            place: Place::GuestRam,
            queues: 1,
            submission: sq_thread(10),
            bell: BellKind::Port,
            interrupts: true,
            buffer_bytes: 1 << 20,
            blocks_max: 1 << 16,
            hole: false,
            policy: None,
        }
    }
}

/// An SQ thread that sleeps after `idle_ms`.
pub fn sq_thread(idle_ms: u64) -> SubmissionConfig {
    SubmissionConfig::SqThread(SqThreadConfig::new(Duration::from_millis(idle_ms)))
}

/// A running virtual machine with attached queues. The drop stops the vCPUs and detaches the queues.
#[derive(Debug)]
pub struct KvmGuest {
    // The fields drop in this order: the vCPUs first.
    cpus: Vec<GuestCpu>,
    queues: Vec<KvmQueue>,
    counters: Vec<ExitCounters>,
    ram: RamSlots,
    machine: Machine,
    device: DirectDevice,
    memory: GuestMemory,
    ram_file: Arc<File>,
    config: KvmGuestConfig,
    buffers_gpa: u64,
}

impl KvmGuest {
    /// Makes the machine, the device and the queues, and tells the guest its queues.
    pub fn start(config: KvmGuestConfig) -> Result<Self> {
        let layout = RamLayout::of(&config);
        let regions = layout.regions(config.hole);
        let file = Arc::new(memfd(layout.ram_bytes + HOLE_BYTES)?);
        let ram_file = file.clone();
        let memory = GuestMemory::new(regions.iter().scan(0, |file_offset_bytes, region| {
            let RamRegion { gpa, len_bytes } = *region;
            let config = RegionConfig { gpa, len_bytes, file: file.clone(), file_offset_bytes: *file_offset_bytes };
            *file_offset_bytes += len_bytes;
            Some(config)
        }))?;
        drop(file);
        let disk = config.disk.clone().logical_block(LogicalBlock::DirectIo);
        let disk = Arc::new(Disk::open(&disk)?);
        let access = if config.disk.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let policy = match config.policy {
            // This policy is wrong on purpose.
            Some(policy) => policy.compile(&kernel::support()?)?.accept_unsafe(),
            None => Policy::direct(access).compile(&kernel::support()?)?,
        };
        let device = DirectDevice::new(disk, &memory, policy, DirectConfig::new(config.submission, Sharing::Clone))?;
        let machine = Machine::new(
            &Kvm::new().context("cannot open /dev/kvm")?,
            MachineConfig { vcpus: config.queues, ram: regions, blocks_max: config.blocks_max },
        )?;
        let ram = RamSlots::map(machine.vm(), &memory, PROGRAM_SLOT + 1)?;
        let mut guest = Self {
            cpus: Vec::new(),
            queues: Vec::new(),
            counters: Vec::new(),
            ram,
            machine,
            device,
            memory,
            ram_file,
            buffers_gpa: layout.buffers_gpa,
            config,
        };
        for cpu in 0..guest.config.queues {
            let vcpu = guest.machine.create_vcpu(cpu)?;
            guest.counters.push(ExitCounters::of(&vcpu)?);
            guest.cpus.push(GuestCpu::start(&guest.machine, cpu, vcpu)?);
            guest.attach(cpu)?;
        }
        Ok(guest)
    }

    /// Attaches the queue of `cpu`, which has none yet, and tells the guest its place.
    fn attach(&mut self, cpu: u32) -> Result<()> {
        let layout = RamLayout::of(&self.config);
        let (window_rings_gpa, window_sqes_gpa) = map::window(cpu);
        let (placement, rings_gpa, sqes_gpa) = match self.config.place {
            Place::GuestRam => {
                let (rings_gpa, sqes_gpa) = layout.ring(cpu);
                (KvmPlacement::GuestRam { rings_gpa, sqes_gpa }, rings_gpa, sqes_gpa)
            }
            Place::Window => {
                let first_slot = PROGRAM_SLOT + 1 + self.ram.len() as u32 + 2 * cpu;
                let (rings_gpa, sqes_gpa) = (window_rings_gpa, window_sqes_gpa);
                (KvmPlacement::Window { rings_gpa, sqes_gpa, first_slot }, rings_gpa, sqes_gpa)
            }
        };
        let (doorbell, bell) = match self.config.bell {
            BellKind::Port => {
                let port = map::DOORBELL_PORT + cpu as u16;
                (IoEventAddress::Pio(port.into()), Bell::Port(port))
            }
            BellKind::Mmio => {
                let gpa = map::DOORBELL_GPA + u64::from(cpu) * 4096;
                (IoEventAddress::Mmio(gpa), Bell::Mmio(gpa))
            }
        };
        let queue = KvmQueue::attach(
            self.machine.vm(),
            &self.device,
            KvmQueueConfig::new(self.config.ring, placement)
                .doorbell(doorbell)
                .interrupt_gsi(self.config.interrupts.then(|| self.machine.queue_gsi(cpu))),
        )?;
        self.tell(cpu, rings_gpa, sqes_gpa, (*queue.layout(), queue.addressing()), bell)?;
        self.queues.push(queue);
        Ok(())
    }

    /// Tells the guest on `cpu` the place of its queue.
    fn tell(
        &mut self,
        cpu: u32,
        rings_gpa: u64,
        sqes_gpa: u64,
        (layout, addressing): (RingLayout, FixedAddressing),
        bell: Bell,
    ) -> Result<()> {
        let mut ram = [RamRegion::default(); RAM_REGIONS_MAX];
        for (entry, region) in ram.iter_mut().zip(self.machine.ram()) {
            *entry = *region;
        }
        let tick_rate = self.cpus[cpu as usize].tick_rate();
        let attachment = Attachment { rings_gpa, sqes_gpa, layout, addressing, bell, ram, tick_rate };
        self.cpus[cpu as usize].run(&Command::Attach(attachment))?;
        Ok(())
    }

    /// Tells the idle guest on `cpu` a place for its queue at which there is no memory. The next command ends the
    /// guest.
    pub fn lead_astray(&mut self, cpu: u32) -> Result<()> {
        let (rings_gpa, sqes_gpa) = map::window(map::VCPUS_MAX - 1);
        let queue = &self.queues[cpu as usize];
        let ring = (*queue.layout(), queue.addressing());
        self.tell(cpu, rings_gpa, sqes_gpa, ring, Bell::Port(map::DOORBELL_PORT))
    }

    /// A verifying job for `cpu`'s part of the disk: mixed, polling, with a time limit of 20 s for each request.
    pub fn job(&self, cpu: u32, block_bytes: u32, depth: u32, blocks: u64) -> Job {
        let area_bytes = blocks * u64::from(block_bytes);
        Job {
            area_offset_bytes: u64::from(cpu) * area_bytes,
            area_bytes,
            operations: 0,
            duration_ns: 0,
            timeout_ns: 20_000_000_000,
            pause_ns: 0,
            seed: 1 + u64::from(cpu),
            buffers_gpa: self.buffers_gpa + u64::from(cpu) * self.config.buffer_bytes,
            buffer_stride_bytes: block_bytes.into(),
            block_bytes,
            depth,
            write_percent: 50,
            durable_percent: 0,
            wait: Wait::Poll,
            verify: Verify::On,
        }
    }

    /// The table of expected contents for a job of `cpu`.
    pub fn table(&self, cpu: u32, job: &Job) -> Result<Table> {
        Ok(self.machine.table(cpu, job.blocks())?)
    }

    /// Runs the jobs of all vCPUs at the same time. Each report must be clean.
    pub fn run_all(&mut self, jobs: &[Job], kind: fn(Job, Table) -> Command) -> Result<Vec<Outcome>> {
        for (cpu, job) in (0u32..).zip(jobs) {
            let table = self.table(cpu, job)?;
            self.cpus[cpu as usize].begin(&kind(*job, table))?;
        }
        let finish = |cpu: &mut GuestCpu| {
            let outcome = cpu.finish(Some(Duration::from_secs(120)))?;
            ensure!(outcome.report.is_clean(), "{}", outcome.report);
            Ok(outcome)
        };
        self.cpus.iter_mut().take(jobs.len()).map(finish).collect()
    }

    /// The vCPUs.
    pub fn cpus_mut(&mut self) -> &mut [GuestCpu] {
        &mut self.cpus
    }

    /// The queues.
    pub fn queues(&self) -> &[KvmQueue] {
        &self.queues
    }

    /// The vCPUs' exit counters.
    pub fn counters(&self) -> &[ExitCounters] {
        &self.counters
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The device.
    pub fn device(&self) -> &DirectDevice {
        &self.device
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The file of the guest's RAM. Everything that uses the RAM has a reference to it.
    pub fn ram_file(&self) -> &Arc<File> {
        &self.ram_file
    }

    /// Fills all RAM except the rings with `content`, which may be longer. The guest must be idle.
    pub fn fill_ram(&self, content: &[u8]) -> Result<()> {
        let start = self.rings_bytes();
        let end = self.memory.len_bytes();
        Ok(self.ram_file.write_all_at(&content[start as usize..end as usize], start)?)
    }

    /// The pages of RAM that differ from `content`, as the bytes of RAM before each of them. The rings and the `free`
    /// ranges may hold anything.
    pub fn changed_ram(&self, content: &[u8], free: &[Range<u64>]) -> Result<Vec<u64>> {
        let mut now = vec![0; usize::try_from(self.memory.len_bytes())?];
        self.ram_file.read_exact_at(&mut now, 0)?;
        let rings = 0..self.rings_bytes();
        let pages = (0..).step_by(4096).zip(now.chunks(4096).zip(content.chunks(4096)));
        let may_change = |at: &u64| rings.contains(at) || free.iter().any(|range| range.contains(at));
        Ok(pages.filter(|(at, (now, before))| !may_change(at) && now != before).map(|(at, _)| at).collect())
    }

    /// The length of the rings at the start of RAM.
    fn rings_bytes(&self) -> u64 {
        u64::from(self.config.queues) * RamLayout::of(&self.config).ring_stride_bytes
    }

    /// The address of the first buffer.
    pub fn buffers_gpa(&self) -> u64 {
        self.buffers_gpa
    }

    /// Stops the vCPUs, then detaches the queues.
    pub fn stop(mut self) -> Vec<RingEnd> {
        self.cpus.clear();
        self.queues.drain(..).map(KvmQueue::detach).collect()
    }

    /// Detaches the queues, while the guest may still use them.
    pub fn detach_under_the_guest(&mut self) -> Vec<RingEnd> {
        self.queues.drain(..).map(KvmQueue::detach).collect()
    }
}

/// The layout of the guest's RAM: the rings of all queues, then the buffers of all queues.
struct RamLayout {
    rings_bytes: u64,
    ring_stride_bytes: u64,
    buffers_gpa: u64,
    ram_bytes: u64,
}

impl RamLayout {
    fn of(config: &KvmGuestConfig) -> Self {
        let KvmGuestConfig { ring, place, queues, buffer_bytes, .. } = *config;
        let rings_bytes = rings_area_bytes(ring.cq_entries);
        let ring_stride_bytes = match place {
            Place::GuestRam => rings_bytes + sqes_area_bytes(ring.sq_entries),
            Place::Window => 0,
        };
        // No block of up to 1 MiB crosses a segment boundary.
        let buffers_gpa = (u64::from(queues) * ring_stride_bytes).next_multiple_of(1 << 20);
        let ram_bytes = buffers_gpa + u64::from(queues) * buffer_bytes.next_multiple_of(4096);
        Self { rings_bytes, ring_stride_bytes, buffers_gpa, ram_bytes }
    }

    fn regions(&self, hole: bool) -> Vec<RamRegion> {
        let mut regions = vec![RamRegion { gpa: 0, len_bytes: self.ram_bytes }];
        if hole {
            regions.push(RamRegion { gpa: self.ram_bytes + HOLE_BYTES, len_bytes: HOLE_BYTES });
        }
        regions
    }

    /// The rings area and the SQE area of a queue.
    fn ring(&self, cpu: u32) -> (u64, u64) {
        let rings_gpa = u64::from(cpu) * self.ring_stride_bytes;
        (rings_gpa, rings_gpa + self.rings_bytes)
    }
}

fn memfd(len_bytes: u64) -> Result<File> {
    let fd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC).context("cannot make a memfd")?;
    rustix::fs::ftruncate(&fd, len_bytes).context("cannot size a memfd")?;
    Ok(fd.into())
}
