//! A process as its own guest: the workload on a ring in its RAM, against a thread that stands for the host kernel and
//! sees that RAM through the file only.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ringpass_guest::{GuestRam, RamAllocator, RamRegion};
use ringpass_guest_abi::{CQ_EVENTFD_DISABLED, Doorbell, DriverRing, FixedAddressing, RingLayout};
use ringpass_workload::{Environment, Job, ProcessEnv, RingQueue, Verify, Wait, Wakeup, prefill, run, verify_all};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MIB: u64 = 1 << 20;
const IOVA_BASE: u64 = 1 << 40;
const RINGS_GPA: u64 = 0;
const SQES_GPA: u64 = 4096;
const LAYOUT: RingLayout = RingLayout {
    sq_entries: 8,
    cq_entries: 16,
    sq_head_offset: 0,
    sq_tail_offset: 4,
    sq_flags_offset: 8,
    cq_head_offset: 64,
    cq_tail_offset: 68,
    cq_flags_offset: 72,
    cqes_offset: 128,
    rings_bytes: 4096,
    sqes_bytes: 4096,
    doorbell: Doorbell::Always,
};

/// RAM of `len_bytes` at address 0 and its allocator, on a new memfd.
fn ram(len_bytes: u64) -> (File, RamAllocator) {
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, len_bytes).unwrap();
    let region = RamRegion { gpa: 0, len_bytes, file: file.as_fd(), offset_bytes: 0 };
    // SAFETY: the file keeps its length, and what stands for the device touches a buffer only while a request in flight
    // names it.
    let ram = unsafe { GuestRam::map(&[region]) }.unwrap();
    (file, Arc::new(ram).allocator().unwrap())
}

/// Any file in the place of an eventfd.
fn not_an_eventfd(file: File) -> EventFd {
    // SAFETY: the descriptor was owned by `file`, which gave it up.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}

fn env() -> (ProcessEnv, EventFd, EventFd) {
    let (_file, mut allocator) = ram(MIB);
    let (doorbell, interrupts) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
    let buffers = allocator.reserve(8192, 8192).unwrap();
    let env = ProcessEnv::new(buffers, doorbell.try_clone().unwrap(), interrupts.try_clone().unwrap());
    (env, doorbell, interrupts)
}

#[test]
fn the_doorbell_is_a_write_to_its_eventfd() {
    let (mut env, doorbell, _) = env();
    env.ring_doorbell();
    env.ring_doorbell();
    assert_eq!(doorbell.read().unwrap(), 2);
    // A counter at its limit is no reason to complain: whoever reads it wakes up.
    doorbell.write(u64::MAX - 1).unwrap();
    env.ring_doorbell();
    assert!(env.take_latencies_ns().is_ok());
}

#[test]
fn an_interrupt_before_or_during_the_wait_ends_it_and_each_only_once() {
    let (mut env, _, interrupts) = env();
    interrupts.write(3).unwrap();
    assert_eq!(env.wait_for_interrupt(u64::MAX), Wakeup::Interrupt);
    let start = Instant::now();
    assert_eq!(env.wait_for_interrupt(20_000_000), Wakeup::TimedOut);
    assert!(start.elapsed() >= Duration::from_millis(20));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            interrupts.write(1).unwrap();
        });
        assert_eq!(env.wait_for_interrupt(60_000_000_000), Wakeup::Interrupt);
    });
}

#[test]
fn buffers_outside_the_area_are_refused() {
    let (mut env, ..) = env();
    env.with_buffer(8192, 8192, |bytes| bytes.fill(7)).unwrap();
    assert_eq!(env.with_buffer(16383, 1, |bytes| bytes[0]), Some(7));
    for (gpa, len_bytes) in [(8191, 1), (16384, 1), (8193, 8192), (u64::MAX, 1)] {
        assert!(env.with_buffer(gpa, len_bytes, |_| ()).is_none(), "{gpa}");
    }
}

#[test]
fn latencies_keep_three_digits_and_are_handed_out_once() {
    let (mut env, ..) = env();
    for latency_ns in 1..=1_000_000 {
        env.record_latency(latency_ns);
    }
    env.record_latency(u64::MAX);
    let latencies_ns = env.take_latencies_ns().unwrap();
    let median_ns = latencies_ns.value_at_quantile(0.5);
    assert!((499_500..=500_500).contains(&median_ns), "{median_ns}");
    assert!(latencies_ns.max() >= 100_000_000_000);
    assert_eq!(env.take_latencies_ns().unwrap().len(), 0);
}

#[test]
fn a_broken_eventfd_is_reported_with_what_it_was_for() {
    let (_file, mut allocator) = ram(MIB);
    let read_only = not_an_eventfd(File::open("/dev/null").unwrap());
    let events = EventFd::new(0).unwrap();
    let mut env = ProcessEnv::new(allocator.allocate(4096).unwrap(), read_only, events);
    env.ring_doorbell();
    let error = env.take_latencies_ns().unwrap_err().to_string();
    assert!(
        error.starts_with("cannot ring the doorbell (write to the queue's eventfd): Bad file descriptor"),
        "{error}"
    );
    assert!(env.take_latencies_ns().is_ok(), "an error is handed out once");

    let write_only = not_an_eventfd(File::options().write(true).open("/dev/null").unwrap());
    let mut env = ProcessEnv::new(allocator.allocate(4096).unwrap(), EventFd::new(0).unwrap(), write_only);
    assert_eq!(env.wait_for_interrupt(1_000_000_000), Wakeup::TimedOut);
    let error = env.take_latencies_ns().unwrap_err().to_string();
    assert!(error.starts_with("cannot wait for interrupts"), "{error}");
}

/// The host's side: takes SQEs at each doorbell, and moves data between the RAM's file and the disk.
struct Host<'a> {
    ram: &'a File,
    disk: &'a File,
    interrupts: &'a EventFd,
    sq_head: u32,
    cq_tail: u32,
}

impl Host<'_> {
    fn word(&self, offset_bytes: u32) -> u32 {
        let mut word = [0; 4];
        self.ram.read_exact_at(&mut word, RINGS_GPA + u64::from(offset_bytes)).unwrap();
        u32::from_ne_bytes(word)
    }

    fn set_word(&self, offset_bytes: u32, value: u32) {
        self.ram.write_all_at(&value.to_ne_bytes(), RINGS_GPA + u64::from(offset_bytes)).unwrap();
    }

    fn serve(&mut self, layout: &RingLayout) {
        while self.word(layout.sq_tail_offset) != self.sq_head {
            let mut sqe = [0; 64];
            self.ram.read_exact_at(&mut sqe, SQES_GPA + u64::from(self.sq_head % layout.sq_entries) * 64).unwrap();
            self.sq_head = self.sq_head.wrapping_add(1);
            self.set_word(layout.sq_head_offset, self.sq_head);
            let word = |at: usize| u64::from_ne_bytes(*sqe[at..].first_chunk().unwrap());
            let (offset_bytes, gpa, len) = (word(8), word(16) - IOVA_BASE, word(24) as u32 as usize);
            let mut data = vec![0; len];
            let (from, from_at, to, to_at) = match sqe[0] {
                4 => (self.disk, offset_bytes, self.ram, gpa),
                5 => (self.ram, gpa, self.disk, offset_bytes),
                other => panic!("opcode {other}"),
            };
            from.read_exact_at(&mut data, from_at).unwrap();
            to.write_all_at(&data, to_at).unwrap();

            let at = layout.cqes_offset + self.cq_tail % layout.cq_entries * 16;
            self.ram.write_all_at(&sqe[32..40], RINGS_GPA + u64::from(at)).unwrap();
            self.set_word(at + 8, len as u32);
            self.cq_tail = self.cq_tail.wrapping_add(1);
            self.set_word(layout.cq_tail_offset, self.cq_tail);
            if self.word(layout.cq_flags_offset) & CQ_EVENTFD_DISABLED == 0 {
                self.interrupts.write(1).unwrap();
            }
        }
    }
}

#[test]
fn a_process_guest_does_verified_io_polling_and_with_interrupts() {
    let (ram_file, mut allocator) = ram(4 * MIB);
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(MIB).unwrap();
    let ring = allocator.ring(RINGS_GPA, &LAYOUT, SQES_GPA).unwrap();
    let mut queue =
        RingQueue::new(DriverRing::new(ring, LAYOUT).unwrap(), FixedAddressing::new(IOVA_BASE, 22).unwrap());
    // More in flight than the SQ has entries.
    let depth = 12;
    let buffers = allocator.allocate(u64::from(depth) * 4096).unwrap();
    let buffers_gpa = buffers.gpa();
    let (doorbell, interrupts) = (EventFd::new(0).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
    let mut env = ProcessEnv::new(buffers, doorbell.try_clone().unwrap(), interrupts.try_clone().unwrap());

    let stop = AtomicBool::new(false);
    let reports = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut host = Host { ram: &ram_file, disk: &disk, interrupts: &interrupts, sq_head: 0, cq_tail: 0 };
            while !stop.load(Ordering::Relaxed) {
                doorbell.read().unwrap();
                host.serve(&LAYOUT);
            }
        });
        let mut expected = vec![0; 256];
        let mut reports = Vec::new();
        for wait in [Wait::Poll, Wait::Interrupt, Wait::InterruptMuting] {
            let job = Job {
                area_offset_bytes: 0,
                area_bytes: MIB,
                operations: 3000,
                duration_ns: 0,
                timeout_ns: 30_000_000_000,
                pause_ns: 0,
                seed: 7,
                buffers_gpa,
                buffer_stride_bytes: 4096,
                block_bytes: 4096,
                depth,
                write_percent: 30,
                durable_percent: 0,
                wait,
                verify: Verify::On,
            };
            reports.push(prefill(&job, &mut queue, &mut env, &mut expected));
            reports.push(run(&job, &mut queue, &mut env, &mut expected));
            reports.push(verify_all(&job, &mut queue, &mut env, &mut expected));
        }
        stop.store(true, Ordering::Relaxed);
        doorbell.write(1).unwrap();
        reports
    });
    let mut total = 0;
    for report in reports {
        let report = report.unwrap();
        assert!(report.is_clean(), "{report}");
        total += report.operations();
    }
    assert_eq!(total, 3 * (256 + 3000 + 256));
    assert_eq!(env.take_latencies_ns().unwrap().len(), total);
}
