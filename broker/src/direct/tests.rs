//! A ring in each place, driven by the guest's side of the ABI.

mod refusals;
mod setup;

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use ringpass_guest_abi::{DriverRing, MappedRing, rings_area_bytes};
use ringpass_restrictions::{Operation, Policy, RegisterOperation, SqeFlags};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use self::setup::{MIB, PATIENCE, RAM_BYTES, RING, RINGS_GPA, Setup, memfd, sq_thread};
use super::*;
use crate::memory::Sharing;

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
    assert!(error.starts_with("cloning the registered buffers failed: Permission denied"), "{error}");
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
