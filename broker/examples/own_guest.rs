//! A ring for a guest of one's own, in the fewest steps: here the guest is this very process.
//!
//! `cargo run -p ringpass-broker --example own_guest -- disk.img` prints the beginning of the disk, read through a ring that
//! the guest drives and the kernel executes.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ringpass_broker::direct::{DirectConfig, DirectDevice, QueueConfig, QueuePlacement, SubmissionConfig};
use ringpass_broker::disk::{DirectIo, Disk, DiskConfig};
use ringpass_broker::kernel;
use ringpass_broker::memory::{GuestMemory, RegionConfig, Sharing};
use ringpass_broker::ring::{RingConfig, SqThreadConfig};
use ringpass_guest::{GuestRam, RamRegion};
use ringpass_guest_abi::{DriverRing, Sqe};
use ringpass_restrictions::{Access, Policy};
use rustix::fs::MemfdFlags;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

const RAM_BYTES: u64 = 1 << 20;
const RINGS_GPA: u64 = 0;
const SQES_GPA: u64 = 0x4000;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("own_guest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: own_guest DISK")?;
    let ram = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&ram, RAM_BYTES)?;
    let ram = Arc::new(File::from(ram));

    // The broker. Guest RAM comes as memfd, tmpfs or hugetlbfs files at guest-physical addresses.
    let disk = DiskConfig::new(path).read_only(true).direct_io(DirectIo::Off);
    let disk = Arc::new(Disk::open(&disk)?);
    let region = RegionConfig { gpa: 0, len_bytes: RAM_BYTES, file: ram.clone(), file_offset_bytes: 0 };
    let memory = GuestMemory::new([region])?;
    let policy = Policy::direct(Access::ReadOnly).compile(&kernel::support()?)?;
    let config = DirectConfig::new(SubmissionConfig::SqThread(SqThreadConfig::default()), Sharing::Clone);
    let device = DirectDevice::new(disk, &memory, policy, config)?;

    // A ring in the guest's RAM, at addresses that its driver chose.
    let doorbell = EventFd::new(EFD_CLOEXEC)?;
    let interrupt = EventFd::new(EFD_CLOEXEC)?;
    let queue = device.attach(
        QueueConfig::new(
            RingConfig { sq_entries: 64, cq_entries: 128 },
            QueuePlacement::GuestRam { rings_gpa: RINGS_GPA, sqes_gpa: SQES_GPA },
        )
        .doorbell(doorbell.try_clone()?)
        .completion(interrupt.try_clone()?),
    )?;

    // The guest. It is told the layout, where the ring is, and how SQEs name its memory.
    let regions = [RamRegion { gpa: 0, len_bytes: RAM_BYTES, file: ram.as_fd(), offset_bytes: 0 }];
    // SAFETY: nobody else uses this RAM but the kernel, on behalf of the request below.
    let mut allocator = Arc::new(unsafe { GuestRam::map(&regions) }?).allocator()?;
    let ring = allocator.ring(RINGS_GPA, queue.layout(), SQES_GPA)?;
    let buffer = allocator.allocate(4096)?;
    let mut ring = DriverRing::new(ring, *queue.layout())?;
    let address = queue.addressing().resolve(buffer.gpa(), 512)?;
    ring.push(&Sqe::read_fixed(address, 512, 0, 42))?;
    if ring.publish() {
        doorbell.write(1)?;
    }
    let completion = loop {
        if let Some(completion) = ring.reap() {
            break completion;
        }
        interrupt.read()?;
    };
    if completion.res < 0 {
        return Err(std::io::Error::from_raw_os_error(-completion.res).into());
    }
    let mut content = vec![0; completion.res as usize];
    buffer.read(0, &mut content);
    println!("{}", content.escape_ascii());

    // Nothing is reused before the last I/O has really landed.
    queue.close().wait(Duration::from_secs(30))?;
    Ok(())
}
