//! Queues, areas and disks that a device refuses, before anything has changed.

use std::fs::File;
use std::num::NonZeroU32;
use std::os::fd::{FromRawFd, IntoRawFd};

use ringpass_guest_abi::rings_area_bytes;
use ringpass_restrictions::{Access, Policy};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::super::*;
use super::setup::{PATIENCE, RAM_BYTES, RING, RINGS_GPA, SQES_GPA, Setup, memfd, sq_thread};
use crate::disk::{DirectIo, DiskConfig};
use crate::memory::Sharing;
use crate::ring::SqThreadConfig;

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
fn a_cpu_that_does_not_exist_is_refused_by_number() {
    let config = SqThreadConfig { cpu: Some(100_000), ..SqThreadConfig::default() };
    let error = SqThread::new(config).unwrap_err().to_string();
    assert!(error.starts_with("the SQ thread cannot run on CPU 100000: Invalid argument"), "{error}");
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
