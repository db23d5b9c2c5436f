//! A host as threads, and an engine that is honest or not.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringpass_guest_abi::request::ErrorCode;
use ringpass_guest_abi::{DriverRing, MappedRing, Sqe};
use ringpass_restrictions::{Access, Policy};
use rustix::fs::MemfdFlags;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::message::{Answer, Encoded, Order};
use super::*;
use crate::alone::alone;
use crate::direct::{DirectConfig, SubmissionConfig};
use crate::disk::{DirectIo, Disk, DiskConfig};
use crate::memory::{GuestMemory, RegionConfig, Sharing};
use crate::ring::{RingConfig, RingEnd};

/// Longer than any step takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const RINGS_GPA: u64 = 0;
const SQES_GPA: u64 = MIB / 2;
const BUFFER_GPA: u64 = MIB;
const RING: RingConfig = RingConfig { sq_entries: 8, cq_entries: 16 };
const OWNER: RingOwner = RingOwner { queue: 1, attachment: 7, cq_entries: 16 };

struct Bench {
    client: RingClient,
    regions: Vec<RegionConfig>,
    memory: GuestMemory,
    disk: Disk,
    doorbell: EventFd,
    /// Gives the excesses that were seen.
    events: JoinHandle<Vec<(RingOwner, Option<u32>)>>,
    _image: tempfile::NamedTempFile,
}

fn region(name: &str, gpa: u64, len_bytes: u64) -> RegionConfig {
    let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len_bytes).unwrap();
    RegionConfig { gpa, len_bytes, file: Arc::new(file), file_offset_bytes: 0 }
}

fn config() -> AttachConfig {
    let policy = Policy::direct(Access::ReadWrite).compile(&crate::kernel::support().unwrap()).unwrap();
    let direct = DirectConfig::new(SubmissionConfig::Doorbell, Sharing::Clone);
    AttachConfig::new(direct, policy).unwrap().entries_max(16, 64).unwrap()
}

impl Bench {
    /// A host for a device with one queue.
    fn new() -> Self {
        let mut image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        image.write_all(&[0x5a; 64 << 10]).unwrap();
        let disk = DiskConfig { direct_io: DirectIo::Off, ..DiskConfig::new(image.path()) };
        let regions = vec![region("ram-stays", 0, 2 * MIB), region("ram-leaves", 4 * MIB, 2 * MIB)];
        let (client, events) = RingHost::in_threads(config(), 1).unwrap().open().unwrap();
        Self {
            client,
            memory: GuestMemory::new(regions.clone()).unwrap(),
            regions,
            disk: Disk::open(&disk).unwrap(),
            doorbell: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap(),
            events: std::thread::spawn(move || follow(&events)),
            _image: image,
        }
    }

    fn pinned() -> Self {
        let mut bench = Self::new();
        bench.client.pin(bench.disk.as_fd(), &bench.regions, &|| true).unwrap();
        bench
    }

    fn try_ring(&mut self, config: RingConfig, rings_gpa: u64) -> Result<HostedRing, Refused> {
        let sqes_gpa = rings_gpa + SQES_GPA;
        let new = NewRing { config, rings_gpa, sqes_gpa, doorbell: &self.doorbell, call: None };
        self.client.make_ring(&new, OWNER)
    }

    fn ring(&mut self) -> HostedRing {
        self.try_ring(RING, RINGS_GPA).unwrap()
    }

    /// The driver of a ring.
    fn driver(&self, ring: &HostedRing) -> DriverRing<MappedRing> {
        let layout = *ring.layout();
        let area = |gpa, len_bytes| NonNull::new(self.memory.host_address(gpa, len_bytes).unwrap()).unwrap();
        let (rings, sqes) = (area(RINGS_GPA, layout.rings_bytes), area(SQES_GPA, layout.sqes_bytes));
        // SAFETY: both areas lie in the guest's RAM, which stays mapped for as long as `self.memory`.
        let memory = unsafe { MappedRing::new(rings, layout.rings_bytes, sqes, layout.sqes_bytes) };
        DriverRing::new(memory, layout).unwrap()
    }

    /// Publishes a read of the first block.
    fn submit_read(&self, ring: &HostedRing, driver: &mut DriverRing<MappedRing>) {
        let address = ring.addressing().resolve(BUFFER_GPA, 4096).unwrap();
        let start = Instant::now();
        while driver.push(&Sqe::read_fixed(address, 4096, 0, 1)).is_err() {
            assert!(start.elapsed() < PATIENCE, "the kernel takes no entries");
            self.doorbell.write(1).unwrap();
            std::thread::yield_now();
        }
        let _ = driver.publish();
        self.doorbell.write(1).unwrap();
    }

    /// Ends the host, and gives the excesses that the engine was told of.
    fn end(self) -> Vec<(RingOwner, Option<u32>)> {
        drop(self.client);
        self.events.join().unwrap()
    }
}

fn follow(events: &RingEvents) -> Vec<(RingOwner, Option<u32>)> {
    let mut excesses = Vec::new();
    loop {
        match events.next(None) {
            NextEvent::Excess { owner, outstanding } => excesses.push((owner, outstanding)),
            NextEvent::Nothing => {}
            NextEvent::Closed => return excesses,
        }
    }
}

fn await_end(end: &RingEnd) {
    end.wait(PATIENCE).unwrap();
}

#[test]
fn a_ring_of_a_host_reads_the_disk_and_its_end_is_told() {
    let mut bench = Bench::pinned();
    let ring = bench.ring();
    let mut driver = bench.driver(&ring);
    bench.submit_read(&ring, &mut driver);
    let start = Instant::now();
    let completion = loop {
        if let Some(completion) = driver.reap() {
            break completion;
        }
        assert!(start.elapsed() < PATIENCE, "no completion");
    };
    assert_eq!(completion.res, 4096);
    let mut block = [0; 4096];
    Bytes::read_slice(bench.memory.mapped(), &mut block, vm_memory::GuestAddress(BUFFER_GPA)).unwrap();
    assert_eq!(block, [0x5a; 4096]);
    let end = ring.end();
    assert!(!end.has_ended());
    drop(ring);
    await_end(&end);
    assert_eq!(bench.end(), []);
}

#[test]
fn a_new_call_eventfd_is_signalled_by_completions_and_another_file_is_refused() {
    let mut bench = Bench::pinned();
    let ring = bench.ring();
    let call = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap();
    ring.set_call(Some(&call)).unwrap();
    let mut driver = bench.driver(&ring);
    bench.submit_read(&ring, &mut driver);
    let start = Instant::now();
    while call.read().is_err() {
        assert!(start.elapsed() < PATIENCE, "no signal");
        std::thread::yield_now();
    }
    // SAFETY: the descriptor is a file of this test, which gives it up.
    let file = unsafe {
        use std::os::fd::{FromRawFd, IntoRawFd};
        EventFd::from_raw_fd(tempfile::tempfile().unwrap().into_raw_fd())
    };
    let refused = ring.set_call(Some(&file)).unwrap_err();
    assert!(refused.why.contains("not an eventfd"), "{}", refused.why);
}

#[test]
fn an_engine_gets_no_larger_ring_and_not_more_rings_than_the_operator_allows() {
    let mut bench = Bench::pinned();
    for (sq_entries, cq_entries) in [(32, 64), (16, 128)] {
        let refused = bench.try_ring(RingConfig { sq_entries, cq_entries }, RINGS_GPA).unwrap_err();
        assert_eq!(refused.code, ErrorCode::Entries, "{}", refused.why);
    }
    let rings: Vec<_> = [0, 65536].map(|gpa| bench.try_ring(RING, gpa).unwrap()).into();
    let refused = bench.try_ring(RING, 2 * 65536).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Resources);
    assert_eq!(refused.why, "there are 2 rings that have not ended");
    let ends: Vec<_> = rings.iter().map(HostedRing::end).collect();
    drop(rings);
    ends.iter().for_each(await_end);
    bench.try_ring(RING, 2 * 65536).unwrap();
}

#[test]
fn without_pinned_memory_there_is_no_ring() {
    let mut bench = Bench::new();
    let refused = bench.try_ring(RING, RINGS_GPA).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Memory, "{}", refused.why);
    bench.client.pin(bench.disk.as_fd(), &bench.regions, &|| true).unwrap();
    bench.client.unpin();
    assert_eq!(bench.try_ring(RING, RINGS_GPA).unwrap_err().code, ErrorCode::Memory);
}

#[test]
fn pinning_that_is_not_wanted_any_more_is_given_up_and_the_next_one_works() {
    let mut bench = Bench::new();
    let large = [region("ram-is-large", 0, 2048 * MIB)];
    let given_up = bench.client.pin(bench.disk.as_fd(), &large, &|| false).unwrap_err();
    assert!(matches!(given_up, PinError::NotWanted), "{given_up:?}");
    bench.client.pin(bench.disk.as_fd(), &bench.regions, &|| true).unwrap();
    drop(bench.ring());
}

#[test]
fn regions_that_make_no_sense_are_refused_with_the_reason() {
    let mut bench = Bench::new();
    let overlapping = [region("ram", 0, 2 * MIB), region("ram", MIB, 2 * MIB)];
    match bench.client.pin(bench.disk.as_fd(), &overlapping, &|| true) {
        Err(PinError::Refused(refused)) => assert!(refused.why.contains("overlap"), "{}", refused.why),
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_that_leaves_is_held_by_neither_side_and_the_ring_goes_on() {
    alone("ring_host::tests::memory_that_leaves_is_held_by_neither_side_and_the_ring_goes_on", || {
        let mut bench = Bench::pinned();
        let ring = bench.ring();
        let mut driver = bench.driver(&ring);
        let stays = bench.regions[..1].to_vec();
        bench.client.set_memory(&stays, &|| true).unwrap();
        assert!(bench.client.await_drain());
        // What this test has itself: the list of regions, and the memory that the driver uses.
        let holders = || {
            let links =
                fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
            links.filter(|link| link.to_string_lossy().contains("ram-leaves")).count()
        };
        assert_eq!(holders(), 1);
        bench.submit_read(&ring, &mut driver);
        let start = Instant::now();
        while driver.reap().is_none() {
            assert!(start.elapsed() < PATIENCE, "no completion");
        }
    });
}

/// Submits three times as many requests as the CQ has entries, and reaps none.
fn exceed(bench: &Bench, ring: &HostedRing, driver: &mut DriverRing<MappedRing>) {
    (0..RING.sq_entries).for_each(|_| bench.submit_read(ring, driver));
    // The honest driver would not go on without reaping. The entries are still in the SQ.
    let layout = *ring.layout();
    let memory = bench.memory.mapped();
    for tail in (2..=6).map(|times| times * RING.sq_entries) {
        let start = Instant::now();
        while Bytes::load::<u32>(memory, word(layout.sq_head_offset), Ordering::Acquire).unwrap() + RING.sq_entries
            != tail
        {
            assert!(start.elapsed() < PATIENCE, "the kernel takes no entries");
            std::thread::yield_now();
        }
        Bytes::store(memory, tail, word(layout.sq_tail_offset), Ordering::Release).unwrap();
        bench.doorbell.write(1).unwrap();
    }
}

/// A word of the ring.
fn word(offset_bytes: u32) -> vm_memory::GuestAddress {
    vm_memory::GuestAddress(RINGS_GPA + u64::from(offset_bytes))
}

#[test]
fn a_ring_with_more_outstanding_than_its_cq_has_entries_ends_and_the_engine_is_told() {
    let mut bench = Bench::pinned();
    let ring = bench.ring();
    let mut driver = bench.driver(&ring);
    exceed(&bench, &ring, &mut driver);
    let end = ring.end();
    let start = Instant::now();
    while !end.has_ended() {
        assert!(start.elapsed() < PATIENCE, "the ring goes on");
        bench.client.control().suspect(ring.id());
        bench.doorbell.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(ring);
    let excesses = bench.end();
    let [(owner, Some(outstanding))] = excesses[..] else { panic!("{excesses:?}") };
    assert_eq!(owner, OWNER);
    assert!(outstanding > RING.cq_entries, "{outstanding}");
}

#[test]
fn each_new_size_of_the_disk_is_answered_and_a_ring_can_be_made_afterwards() {
    let mut bench = Bench::pinned();
    // More than a socket has room for.
    (0..1000).for_each(|sectors| bench.client.control().set_disk_size(sectors * 512));
    drop(bench.ring());
}

#[test]
fn a_suspicion_without_ground_ends_nothing() {
    let mut bench = Bench::pinned();
    let ring = bench.ring();
    for _ in 0..5 {
        bench.client.control().suspect(ring.id());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!ring.end().has_ended());
    drop(ring);
    assert_eq!(bench.end(), []);
}

#[test]
fn the_threads_of_a_host_end_with_its_engine() {
    alone("ring_host::tests::the_threads_of_a_host_end_with_its_engine", || {
        let threads = || fs::read_dir("/proc/self/task").unwrap().count();
        let before = threads();
        let mut bench = Bench::pinned();
        let ring = bench.ring();
        let end = ring.end();
        drop(ring);
        await_end(&end);
        bench.end();
        let start = Instant::now();
        while threads() > before {
            assert!(start.elapsed() < PATIENCE, "{} threads are left", threads() - before);
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

/// What the host answers to a packet without descriptors.
fn answer_without_files(engine: &RingHost, message: Encoded<'_>) -> Answer {
    engine.orders.send(&message.words, "", &[]).unwrap();
    Answer::decode(engine.orders.receive().unwrap().unwrap()).unwrap()
}

#[test]
fn an_order_whose_file_was_lost_is_refused_and_the_next_one_works() {
    let (engine, host) = sockets().unwrap();
    let (mut maker, _controller) = host::new(config(), 1, None, host).unwrap();
    let maker = std::thread::spawn(move || maker.run());
    assert_eq!(Answer::decode(engine.orders.receive().unwrap().unwrap()).unwrap(), Answer::Done);
    let file = tempfile::tempfile().unwrap();
    let lost = |answer| matches!(answer, Answer::Refused(refused) if refused.why.contains("a file was lost"));
    let region = Order::Region { gpa: 0, len_bytes: MIB, file_offset_bytes: 0, file_number: 0, file: file.as_fd() };
    let region = region.encode();
    // A region has no answer.
    engine.orders.send(&region.words, "", &[]).unwrap();
    assert!(lost(answer_without_files(&engine, Order::SetMemory { number: 1 }.encode())));
    assert!(lost(answer_without_files(&engine, Order::Pin { number: 2, disk: file.as_fd() }.encode())));
    // The loss is not held against a later order.
    let answer = answer_without_files(&engine, Order::SetMemory { number: 3 }.encode());
    assert!(matches!(&answer, Answer::Refused(refused) if !refused.why.contains("lost")), "{answer:?}");
    assert_eq!(answer_without_files(&engine, Order::Unpin.encode()), Answer::Done);
    drop(engine);
    assert!(maker.join().unwrap());
}

#[test]
fn an_engine_does_not_wait_for_ever_for_a_host_that_does_not_start() {
    let (RingHost { orders, control, events }, _host) = sockets().unwrap();
    let refused = client::open([orders, control, events], Duration::from_millis(5)).unwrap_err();
    assert!(refused.contains("not ready"), "{refused}");
}

#[test]
fn a_host_that_gets_nonsense_ends_and_says_so() {
    let (engine, host) = sockets().unwrap();
    let (mut maker, controller) = host::new(config(), 1, None, host).unwrap();
    engine.orders.send(&[99; channel::WORDS], "", &[]).unwrap();
    assert!(!maker.run());
    engine.control.send(&[99; channel::WORDS], "", &[]).unwrap();
    assert!(!controller.run());
}

#[test]
fn an_engine_that_reads_no_events_does_not_keep_the_guard_from_ending_rings() {
    let (engine, host) = sockets().unwrap();
    let full = (0..).take_while(|_| host[2].send_now(&[0; channel::WORDS])).count();
    assert!(full > 10, "the socket takes {full} packets");
    let (mut maker, controller) = host::new(config(), 1, None, host).unwrap();
    std::thread::spawn(move || maker.run());
    std::thread::spawn(move || controller.run());
    let (mut client, _events) = engine.open().unwrap();
    let bench = Bench::new();
    client.pin(bench.disk.as_fd(), &bench.regions, &|| true).unwrap();
    let new = NewRing { config: RING, rings_gpa: RINGS_GPA, sqes_gpa: SQES_GPA, doorbell: &bench.doorbell, call: None };
    let ring = client.make_ring(&new, OWNER).unwrap();
    let mut driver = bench.driver(&ring);
    exceed(&bench, &ring, &mut driver);
    // The guard closes the ring, so that the doorbell is answered no more.
    let start = Instant::now();
    let head =
        || Bytes::load::<u32>(bench.memory.mapped(), word(ring.layout().sq_head_offset), Ordering::Acquire).unwrap();
    loop {
        client.control().suspect(ring.id());
        std::thread::sleep(Duration::from_millis(100));
        let before = head();
        Bytes::store(bench.memory.mapped(), before + 1, word(ring.layout().sq_tail_offset), Ordering::Release).unwrap();
        bench.doorbell.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        if head() == before {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "the ring goes on");
    }
}
