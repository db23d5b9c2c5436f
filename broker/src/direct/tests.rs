//! A ring in each place, driven by the guest's side of the ABI.

use std::fs::File;
use std::io::Write;
use std::num::NonZeroU32;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use ringpass_guest_abi::{Cqe, DriverRing, FixedAddressing, MappedRing, Sqe, rings_area_bytes};
use ringpass_restrictions::{Access, Operation, Policy, RegisterOperation, SqeFlags};
use rustix::fs::MemfdFlags;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::*;
use crate::disk::{DirectIo, DiskConfig};
use crate::memory::{IOVA_BASE, Sharing};
use crate::ring::{RingConfig, SqThreadConfig};

/// Longer than any step takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 2 * MIB;
const RINGS_GPA: u64 = 0;
const SQES_GPA: u64 = MIB / 2;
const BUFFER_GPA: u64 = MIB;
const RING: RingConfig = RingConfig { sq_entries: 8, cq_entries: 16 };

/// A guest in this process, its disk, and its device.
struct Setup {
    device: DirectDevice,
    memory: GuestMemory,
    doorbell: EventFd,
    content: Vec<u8>,
    _image: tempfile::NamedTempFile,
}

fn memfd(len_bytes: u64) -> Arc<File> {
    let fd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len_bytes).unwrap();
    Arc::new(File::from(fd))
}

impl Setup {
    fn new(submission: SubmissionConfig) -> Self {
        Self::with(submission, Sharing::Clone)
    }

    fn with(submission: SubmissionConfig, sharing: Sharing) -> Self {
        let mut image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let content: Vec<u8> = (0..64 * 4096u32).map(|at| (at / 4096 * 7 + at) as u8).collect();
        image.write_all(&content).unwrap();
        let config = DiskConfig { direct_io: DirectIo::Off, ..DiskConfig::new(image.path()) };
        let disk = Arc::new(Disk::open(&config).unwrap());
        let region = RegionConfig { gpa: 0, len_bytes: RAM_BYTES, file: memfd(RAM_BYTES), file_offset_bytes: 0 };
        let memory = GuestMemory::new([region]).unwrap();
        let policy = Policy::direct(Access::ReadWrite).compile(&crate::kernel::support().unwrap()).unwrap();
        let config = DirectConfig { submission, workers: IoWorkers::default(), sharing };
        let device = DirectDevice::new(disk, &memory, policy, config).unwrap();
        Self { device, memory, doorbell: EventFd::new(EFD_CLOEXEC).unwrap(), content, _image: image }
    }

    fn attach(&self, placement: QueuePlacement, completion: Option<EventFd>) -> DirectQueue {
        let doorbell = Some(self.doorbell.try_clone().unwrap());
        self.device.attach(QueueConfig { ring: RING, placement, doorbell, completion }).unwrap()
    }

    fn in_guest_ram(&self) -> (DirectQueue, DriverRing<MappedRing>) {
        let queue = self.attach(QueuePlacement::GuestRam { rings_gpa: RINGS_GPA, sqes_gpa: SQES_GPA }, None);
        let layout = *queue.layout();
        let area = |gpa, len_bytes| NonNull::new(self.memory.host_address(gpa, len_bytes).unwrap()).unwrap();
        let (rings, sqes) = (area(RINGS_GPA, layout.rings_bytes), area(SQES_GPA, layout.sqes_bytes));
        // SAFETY: both areas lie in the guest's RAM, which stays mapped for as long as `self.memory`.
        let memory = unsafe { MappedRing::new(rings, layout.rings_bytes, sqes, layout.sqes_bytes) };
        let ring = DriverRing::new(memory, layout).unwrap();
        (queue, ring)
    }

    /// Reads the first block to `gpa`.
    fn read_into(&self, ring: &mut DriverRing<MappedRing>, gpa: u64) -> Cqe {
        let address = FixedAddressing { iova_base: IOVA_BASE }.resolve(gpa, 4096).unwrap();
        self.perform(ring, &Sqe::read_fixed(address, 4096, 0, 1))
    }

    /// Reads one block into the buffer and returns its completion and what the buffer then holds.
    fn read(&self, ring: &mut DriverRing<MappedRing>, block: u64) -> (Cqe, Vec<u8>) {
        let address = FixedAddressing { iova_base: IOVA_BASE }.resolve(BUFFER_GPA, 4096).unwrap();
        let cqe = self.perform(ring, &Sqe::read_fixed(address, 4096, block * 4096, block));
        let mut buffer = vec![0; 4096];
        vm_memory::Bytes::read_slice(self.memory.mapped(), &mut buffer, vm_memory::GuestAddress(BUFFER_GPA)).unwrap();
        (cqe, buffer)
    }

    fn perform(&self, ring: &mut DriverRing<MappedRing>, sqe: &Sqe) -> Cqe {
        ring.push(sqe).unwrap();
        if ring.publish() {
            self.doorbell.write(1).unwrap();
        }
        let started = Instant::now();
        loop {
            if let Some(cqe) = ring.reap() {
                return cqe;
            }
            assert!(started.elapsed() < PATIENCE, "no completion");
            std::thread::yield_now();
        }
    }

    fn check_reads(&self, ring: &mut DriverRing<MappedRing>) {
        for block in [0, 63, 17, 17, 40] {
            let (cqe, buffer) = self.read(ring, block);
            assert_eq!((cqe.user_data, cqe.res), (block, 4096));
            assert_eq!(buffer, &self.content[block as usize * 4096..][..4096]);
        }
    }
}

fn sq_thread() -> SubmissionConfig {
    SubmissionConfig::SqThread(SqThreadConfig { idle: Duration::from_millis(1), cpu: None })
}

#[test]
fn a_ring_in_guest_ram_reads_the_disk_with_an_sq_thread_and_with_doorbells() {
    for submission in [sq_thread(), SubmissionConfig::Doorbell] {
        let setup = Setup::new(submission);
        let (queue, mut ring) = setup.in_guest_ram();
        setup.check_reads(&mut ring);
        queue.close().wait(PATIENCE).unwrap();
    }
}

#[test]
fn a_ring_in_a_window_ends_once_nothing_holds_the_window() {
    let setup = Setup::new(sq_thread());
    let queue = setup.attach(QueuePlacement::Window, None);
    let window = queue.window().unwrap();
    // SAFETY: the window stays mapped until it is dropped below, after the last use of the ring.
    let memory = unsafe { MappedRing::new(window.rings(), window.rings_bytes(), window.sqes(), window.sqes_bytes()) };
    let mut ring = DriverRing::new(memory, *queue.layout()).unwrap();
    setup.check_reads(&mut ring);
    let end = queue.close();
    assert_eq!(end.wait(Duration::from_millis(300)).unwrap_err().to_string().split(" of").next(), Some("I/O"));
    drop(window);
    end.wait(PATIENCE).unwrap();
}

#[test]
fn earlier_content_of_guest_ram_does_not_reach_the_new_ring() {
    let setup = Setup::new(sq_thread());
    let junk = vec![0xff; rings_area_bytes(RING.cq_entries) as usize];
    vm_memory::Bytes::write_slice(setup.memory.mapped(), &junk, vm_memory::GuestAddress(RINGS_GPA)).unwrap();
    let (_queue, mut ring) = setup.in_guest_ram();
    assert_eq!(ring.reap(), None);
    setup.check_reads(&mut ring);
}

#[test]
fn a_new_completion_eventfd_is_signalled_once_at_once_and_then_by_completions() {
    let setup = Setup::new(sq_thread());
    let completion = || EventFd::new(EFD_CLOEXEC | vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    let (first, second) = (completion(), completion());
    let (queue, mut ring) = setup.in_guest_ram();
    queue.replace_completion(Some(&first)).unwrap();
    assert_eq!(first.read().unwrap(), 1);
    setup.check_reads(&mut ring);
    assert_eq!(first.read().unwrap(), 5);
    queue.replace_completion(Some(&second)).unwrap();
    assert_eq!(second.read().unwrap(), 1);
    setup.check_reads(&mut ring);
    assert!(first.read().is_err(), "the old eventfd is left alone");
    queue.replace_completion(None).unwrap();
    setup.check_reads(&mut ring);
    assert_eq!(second.read().unwrap(), 5);
}

#[test]
fn a_file_that_is_not_an_eventfd_is_refused_before_any_change() {
    let setup = Setup::new(sq_thread());
    let not_an_eventfd = || {
        let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/zero").unwrap();
        // SAFETY: the descriptor belonged to the file, which gave it up.
        unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
    };
    let junk = vec![0xff; rings_area_bytes(RING.cq_entries) as usize];
    vm_memory::Bytes::write_slice(setup.memory.mapped(), &junk, vm_memory::GuestAddress(RINGS_GPA)).unwrap();
    let refusal = |doorbell, completion| {
        let placement = QueuePlacement::GuestRam { rings_gpa: RINGS_GPA, sqes_gpa: SQES_GPA };
        setup.device.attach(QueueConfig { ring: RING, placement, doorbell, completion }).unwrap_err().to_string()
    };
    assert_eq!(refusal(Some(not_an_eventfd()), None), "the doorbell is not an eventfd: make it with eventfd(2)");
    assert_eq!(refusal(None, Some(not_an_eventfd())), "the completion is not an eventfd: make it with eventfd(2)");
    let mut area = vec![0; junk.len()];
    vm_memory::Bytes::read_slice(setup.memory.mapped(), &mut area, vm_memory::GuestAddress(RINGS_GPA)).unwrap();
    assert!(area == junk, "a ring was made in the guest's memory");

    let completion = EventFd::new(EFD_CLOEXEC | vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    let (queue, mut ring) = setup.in_guest_ram();
    queue.replace_completion(Some(&completion)).unwrap();
    queue.replace_completion(Some(&not_an_eventfd())).unwrap_err();
    setup.check_reads(&mut ring);
    assert_eq!(completion.read().unwrap(), 6, "the old eventfd stays, and was signalled once when it was new");
}

#[test]
fn unsuitable_areas_are_refused_by_name() {
    let setup = Setup::new(sq_thread());
    let refusal = |rings_gpa, sqes_gpa| {
        let placement = QueuePlacement::GuestRam { rings_gpa, sqes_gpa };
        let config = QueueConfig { ring: RING, placement, doorbell: None, completion: None };
        setup.device.attach(config).unwrap_err().to_string()
    };
    assert_eq!(refusal(100, SQES_GPA), "the rings area at guest-physical 0x64 is not aligned to 4096 bytes");
    assert_eq!(refusal(0, 4096 + 8), "the SQE area at guest-physical 0x1008 is not aligned to 4096 bytes");
    assert_eq!(
        refusal(4096, 4096),
        "the rings area at guest-physical 0x1000 (4096 bytes) and the SQE area at 0x1000 (4096 bytes) overlap"
    );
    let outside = "the 0x1000 bytes at guest-physical 0x200000 do not lie inside one memory region of the guest";
    assert_eq!(refusal(0, RAM_BYTES), outside);
    assert_eq!(refusal(RAM_BYTES, 0), outside);
    assert!(refusal(u64::MAX - 4095, 0).contains("do not lie inside one memory region"));
}

#[test]
fn areas_of_a_ring_that_has_not_ended_are_refused() {
    let setup = Setup::new(sq_thread());
    let (queue, mut ring) = setup.in_guest_ram();
    setup.check_reads(&mut ring);
    let refusal = |sqes_gpa| {
        let placement = QueuePlacement::GuestRam { rings_gpa: 0x4000, sqes_gpa };
        let config = QueueConfig { ring: RING, placement, doorbell: None, completion: None };
        setup.device.attach(config).map(|_| ()).map_err(|error| error.to_string())
    };
    let running = "the areas at guest-physical 0x4000 and 0x80000 overlap those of a ring that has not ended (the ring has \
                   not been closed): use others, or wait for its end";
    assert_eq!(refusal(SQES_GPA), Err(running.into()));
    drop(queue);
    let error = refusal(SQES_GPA).expect_err("a ring does not end at once");
    assert!(error.contains("I/O of the ring is still under way"), "{error}");
    let ends = setup.device.ends();
    assert_eq!(ends.len(), 1, "the device keeps the end of a dropped queue");
    ends[0].wait(PATIENCE).unwrap();
    assert_eq!(setup.device.ends().len(), 0);
    refusal(SQES_GPA).unwrap();
}

#[test]
fn the_areas_of_a_ring_that_failed_half_way_are_in_use_until_it_has_ended() {
    let mut setup = Setup::new(sq_thread());
    let regular = File::open("/proc/self/exe").unwrap();
    // SAFETY: the file gave up its descriptor, which now has this owner only.
    let not_an_eventfd = unsafe { <EventFd as std::os::fd::FromRawFd>::from_raw_fd(regular.into_raw_fd()) };
    let placement = QueuePlacement::GuestRam { rings_gpa: RINGS_GPA, sqes_gpa: SQES_GPA };
    let config = |doorbell| QueueConfig { ring: RING, placement, doorbell, completion: None };
    setup.device.attach(config(Some(not_an_eventfd))).expect_err("refused before there is a ring");
    assert_eq!(setup.device.ends().len(), 0);

    // The kernel refuses worker limits above i32::MAX, after the ring's creation.
    setup.device.workers = IoWorkers { bounded: NonZeroU32::MAX, unbounded: NonZeroU32::MAX };
    let error = setup.device.attach(config(None)).unwrap_err().to_string();
    assert!(error.starts_with("limiting the ring's io-wq workers"), "{error}");
    let ends = setup.device.ends();
    assert_eq!(ends.len(), 1);
    setup.device.workers = IoWorkers::default();
    let error = setup.device.attach(config(None)).unwrap_err().to_string();
    assert!(error.contains("overlap those of a ring that has not ended"), "{error}");
    ends[0].wait(PATIENCE).unwrap();
    let (_queue, mut ring) = setup.in_guest_ram();
    setup.check_reads(&mut ring);
}

#[test]
fn a_queue_without_sq_thread_and_doorbell_is_refused() {
    let setup = Setup::new(SubmissionConfig::Doorbell);
    let config = QueueConfig { ring: RING, placement: QueuePlacement::Window, doorbell: None, completion: None };
    assert_eq!(
        setup.device.attach(config).unwrap_err().to_string(),
        "the queue has neither an SQ thread nor a doorbell: nothing would submit the requests in its SQ"
    );
}

#[test]
fn a_kernel_that_cannot_clone_pins_for_each_queue() {
    let setup = Setup::with(sq_thread(), Sharing::PinAgain);
    let (_queue, mut ring) = setup.in_guest_ram();
    setup.check_reads(&mut ring);
    let more = RegionConfig { gpa: 9 << 30, len_bytes: MIB, file: memfd(MIB), file_offset_bytes: 0 };
    let error = setup.device.plug(more).unwrap_err().to_string();
    assert!(error.starts_with("memory cannot be added to running queues"), "{error}");
    setup.check_reads(&mut ring);
}

#[test]
fn queues_of_a_device_share_one_sq_thread() {
    let setup = Setup::new(sq_thread());
    let place = |rings_gpa| QueuePlacement::GuestRam { rings_gpa, sqes_gpa: rings_gpa + 0x4000 };
    let sq_thread_of = |queue: &DirectQueue| {
        let fd = lock(&queue.running).as_ref().unwrap().ring.fd().raw();
        // The kernel does not wait for the ring's lock: while the SQ thread holds it, the answer is -1.
        let answers = std::iter::repeat_with(|| {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
            let thread = info.lines().find_map(|line| line.strip_prefix("SqThread:")).unwrap_or("-1").trim();
            thread.parse::<i32>().unwrap()
        });
        // Before the SQ thread runs for the first time, the file names the thread that created the ring.
        let is_sq_thread = |thread: &i32| {
            let name = std::fs::read_to_string(format!("/proc/self/task/{thread}/comm"));
            name.is_ok_and(|name| name.starts_with("iou-sqp-"))
        };
        let end = Instant::now() + PATIENCE;
        answers.take_while(|_| Instant::now() < end).find(is_sq_thread).expect("an SQ thread")
    };
    let first = setup.attach(place(0), None);
    let second = setup.attach(place(0x10000), None);
    let thread = sq_thread_of(&first);
    assert_eq!(sq_thread_of(&second), thread);
    drop(first);
    let third = setup.attach(place(0x20000), None);
    assert_eq!(sq_thread_of(&third), thread, "the thread stays while any queue has it");
}

#[test]
fn a_cpu_that_does_not_exist_is_refused_by_number() {
    let config = SqThreadConfig { cpu: Some(100_000), ..SqThreadConfig::default() };
    let error = SqThread::new(config).unwrap_err().to_string();
    assert!(error.starts_with("the SQ thread cannot run on CPU 100000: Invalid argument"), "{error}");
}

#[test]
fn memory_plugged_under_a_running_queue_is_reachable_by_it() {
    let setup = Setup::new(sq_thread());
    let (_queue, mut ring) = setup.in_guest_ram();
    setup.check_reads(&mut ring);
    let gpa = 9 << 30;
    assert_eq!(setup.read_into(&mut ring, gpa).res, -nix::libc::EFAULT);
    let file = memfd(MIB);
    setup.device.plug(RegionConfig { gpa, len_bytes: MIB, file: file.clone(), file_offset_bytes: 0 }).unwrap();
    assert_eq!(setup.read_into(&mut ring, gpa).res, 4096);
    let mut found = vec![0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&*file, &mut found, 0).unwrap();
    assert_eq!(found, &setup.content[..4096]);
    setup.check_reads(&mut ring);
}

#[test]
fn a_plug_that_one_queue_refuses_is_undone_in_the_others() {
    let mut setup = Setup::new(sq_thread());
    let (_able, mut ring) = setup.in_guest_ram();
    let unable = Policy::new()
        .allow(Operation::READ_FIXED)
        .with_flags_allowed(SqeFlags::FIXED_FILE)
        .with_flags_required(SqeFlags::FIXED_FILE)
        .allow_register(RegisterOperation::REGISTER_EVENTFD);
    setup.device.policy = unable.compile(&crate::kernel::support().unwrap()).unwrap();
    let refusing = setup.attach(QueuePlacement::Window, None);

    let gpa = 9 << 30;
    let file = memfd(MIB);
    let plug = || setup.device.plug(RegionConfig { gpa, len_bytes: MIB, file: file.clone(), file_offset_bytes: 0 });
    let error = plug().unwrap_err().to_string();
    assert!(error.starts_with("cloning the registered buffers: Permission denied"), "{error}");
    assert_eq!(setup.read_into(&mut ring, gpa).res, -nix::libc::EFAULT, "the first queue has lost it again");
    assert_eq!(setup.device.memory().len_bytes(), RAM_BYTES);
    setup.check_reads(&mut ring);

    drop(refusing);
    plug().expect("without the queue that refuses the memory");
    assert_eq!(setup.read_into(&mut ring, gpa).res, 4096);
}

#[test]
fn worker_limits_are_accepted_for_both_ways_of_submission() {
    for submission in [sq_thread(), SubmissionConfig::Doorbell] {
        let mut setup = Setup::new(submission);
        setup.device.workers = IoWorkers { bounded: NonZeroU32::new(2).unwrap(), unbounded: NonZeroU32::MIN };
        let (_queue, mut ring) = setup.in_guest_ram();
        setup.check_reads(&mut ring);
    }
}

#[test]
fn no_descriptor_of_a_ring_survives_exec() {
    let setup = Setup::new(sq_thread());
    let (_queue, _ring) = setup.in_guest_ram();
    let mut seen = String::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap() {
        let path = entry.unwrap().path();
        let Ok(info) = std::fs::read_to_string(&path) else { continue };
        let fd = path.file_name().unwrap().to_str().unwrap();
        // Closed meanwhile.
        let Ok(target) = std::fs::read_link(format!("/proc/self/fd/{fd}")) else { continue };
        let ours = ["io_uring", "ringpass", "guest-ram", "eventpoll"];
        if ours.iter().any(|name| target.to_string_lossy().contains(name)) {
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
            assert_ne!(flags & nix::libc::O_CLOEXEC, 0, "{target:?} is inherited by programs that are started");
            seen.push_str(&target.to_string_lossy());
        }
    }
    assert!(seen.contains("io_uring") && seen.contains("guest-ram"), "other names? {seen}");
}

#[test]
fn a_disk_with_an_integrity_profile_is_refused_with_the_reason() {
    refuse_integrity_profile(Path::new("/dev/x"), None).unwrap();
    let error =
        refuse_integrity_profile(Path::new("/dev/x"), Some("T10-DIF-TYPE1-CRC".into())).unwrap_err().to_string();
    for part in ["\"/dev/x\"", "T10-DIF-TYPE1-CRC", "attr_ptr", "vhost-user"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_disk_with_smaller_blocks_than_direct_io_is_refused_with_the_remedy() {
    let image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    image.as_file().set_len(64 * 4096).unwrap();
    let config = DiskConfig { direct_io: DirectIo::On, ..DiskConfig::new(image.path()) };
    let disk = Arc::new(Disk::open(&config).unwrap().with_direct_block(8192));
    let region = RegionConfig { gpa: 0, len_bytes: RAM_BYTES, file: memfd(RAM_BYTES), file_offset_bytes: 0 };
    let memory = GuestMemory::new([region]).unwrap();
    let policy = Policy::direct(Access::ReadWrite).compile(&crate::kernel::support().unwrap()).unwrap();
    let config =
        DirectConfig { submission: SubmissionConfig::Doorbell, workers: IoWorkers::default(), sharing: Sharing::Clone };
    let refused = DirectDevice::new(disk, &memory, policy, config).unwrap_err();
    assert!(matches!(refused, RingError::FinerBlocks { direct_block_bytes: 8192, .. }), "{refused}");
    let message = refused.to_string();
    assert!(message.contains("blocks of 512 bytes, but direct I/O there takes blocks of 8192"), "{message}");
    assert!(message.contains("Open the disk with blocks of 8192 bytes (LogicalBlock::DirectIo)"), "{message}");
}
