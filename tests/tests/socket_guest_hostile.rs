//! A driver that asks for rings and then does anything: to its control page, areas, indexes and virtqueues, at any time.
//! The broker survives, the next guest is served, and nothing but the guest's own memory and disk is touched.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_guest::vhost_user::Way;
use ringpass_guest_abi::{
    Sqe,
    attach::{AreaAddress, AttachPayload},
    request::{DetachPayload, T_ARM, T_ATTACH, T_DETACH, T_EVENT, T_PROBE},
};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::{
        blk::header,
        descriptor::Descriptor,
        event::Eventfds,
        ram::{Arena, Ram, RamRegion},
        rig::Rig,
        session::{FrontEnd, Options},
        vring::{DriverVring, VringLayout},
    },
    harness::{self, Test, test},
    needs::Need,
    seed::Seed,
    socket_guest::{Load, LoadedQueue, connect, options},
};
use ringpass_workload::Wait;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 16 * MIB;
/// Guest RAM is the middle part of its file; before and behind it are bytes that nobody may touch.
const PART_BYTES: u64 = 2 * MIB;
const RAM_GPA: u64 = 3 * MIB;
const CANARY: u8 = 0xc5;
const QUEUES: u16 = 3;
/// A message whose answer takes longer is one that hangs.
const HANG: Duration = Duration::from_secs(20);
/// What the device announces first: epoch 1 is open.
const OPEN_1: u32 = 1 << 2 | 1;
/// How much more memory of its own the broker may have at the end than after a quarter: its allocator's.
const GROWTH_BYTES: u64 = 4 * MIB;

fn main() -> ExitCode {
    let with = |name: &str, body: fn() -> Result<()>| -> Test {
        let needs = DiskKind::Ext4PageCache.needs().into_iter().chain(broker_process::needs());
        test(name, needs.chain([Need::cpus(2)]), body)
    };
    harness::run(vec![
        with("a_driver_that_does_anything_harms_itself_only_by_sq_thread", || hostile("sq-thread")),
        with("a_driver_that_does_anything_harms_itself_only_by_doorbell", || hostile("doorbell")),
        with("a_front_end_that_goes_at_any_message_leaves_nothing_behind", disconnects),
    ])
}

fn arguments(submission: &'static str) -> [&'static str; 8] {
    ["--mode", "direct", "--num-queues", "3", "--submission", submission, "--sq-idle-ms", "1"]
}

/// 30 s in every test run, as both together.
fn hostile(submission: &'static str) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&arguments(submission))?;
    let duration = harness::time_budget(Duration::from_secs(15), Duration::from_secs(600));
    broker.explain(rounds(&rig, &broker, seed, duration).with_context(|| format!("{seed}")))
}

fn rounds(rig: &Rig, broker: &BrokerProcess, seed: Seed, duration: Duration) -> Result<()> {
    let memory = HostileRam::new()?;
    serve_honestly(&rig.socket(), seed)?;
    let fds = broker.usage()?.fds;
    let (start, mut round, mut settled_bytes) = (Instant::now(), 0_u64, None);
    let (mut steps, mut opened) = (0, 0);
    let mut next_honest = duration / 8;
    while start.elapsed() < duration {
        let mut rng = seed.derive(round).rng();
        let (more_steps, more_opened) =
            memory.session(&rig.socket(), &mut rng).with_context(|| format!("round {round}"))?;
        (steps, opened) = (steps + more_steps, opened + more_opened);
        round += 1;
        if start.elapsed() >= next_honest {
            next_honest += duration / 8;
            serve_honestly(&rig.socket(), seed).with_context(|| format!("after round {round}"))?;
            memory.check_canaries().with_context(|| format!("after round {round}"))?;
        }
        if settled_bytes.is_none() && start.elapsed() >= duration / 4 {
            settled_bytes = Some(broker.usage()?.anonymous_bytes);
        }
    }
    serve_honestly(&rig.socket(), seed)?;
    memory.check_canaries()?;
    broker.wait_for_fds(fds)?;
    await_unpinned(broker)?;
    let bytes = broker.usage()?.anonymous_bytes;
    let settled_bytes = settled_bytes.unwrap_or(bytes);
    ensure!(bytes <= settled_bytes + GROWTH_BYTES, "{bytes} bytes of memory, {settled_bytes} after a quarter");
    ensure!(rig.disk_file()?.metadata()?.len() == DISK_BYTES, "the disk has another size");
    eprintln!("{round} sessions, {steps} steps, {opened} rings seen");
    ensure!(round >= 20 && opened >= 20, "only {round} sessions and {opened} rings");
    Ok(())
}

/// A guest that does nothing wrong gets its ring, and every byte is right.
fn serve_honestly(socket: &Path, seed: Seed) -> Result<()> {
    let disk = connect(socket, options(1, 2 * MIB, Way::Ring))?;
    let load = Load { depth: 4, block_bytes: 4096, blocks: 64, wait: Wait::Interrupt };
    let mut queue = LoadedQueue::new(&disk, 1, load, seed)?;
    queue.fill()?;
    queue.run(0, 200)?;
    queue.verify().map(drop)
}

/// No guest memory is pinned once the rings have ended.
fn await_unpinned(broker: &BrokerProcess) -> Result<()> {
    let end = Instant::now() + HANG;
    loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", broker.pid()))?;
        let line = status.lines().find(|line| line.starts_with("VmPin:")).context("VmPin is in the status")?;
        if line.split_whitespace().nth(1) == Some("0") {
            return Ok(());
        }
        ensure!(Instant::now() < end, "memory stays pinned: {line}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// RAM in the middle of a file.
struct HostileRam {
    file: Arc<File>,
    region: RamRegion,
}

impl HostileRam {
    fn new() -> Result<Self> {
        let file = File::from(memfd_create("hostile-ram", MemfdFlags::CLOEXEC)?);
        file.set_len(3 * PART_BYTES)?;
        for part in [0, 2] {
            file.write_all_at(&vec![CANARY; PART_BYTES as usize], part * PART_BYTES)?;
        }
        let file = Arc::new(file);
        let region = RamRegion::of_file(file.clone(), PART_BYTES, RAM_GPA, PART_BYTES)?;
        Ok(Self { file, region })
    }

    fn check_canaries(&self) -> Result<()> {
        let mut part = vec![0; PART_BYTES as usize];
        for index in [0, 2] {
            self.file.read_exact_at(&mut part, index * PART_BYTES)?;
            ensure!(part.iter().all(|&byte| byte == CANARY), "bytes beside guest RAM were written");
        }
        Ok(())
    }

    /// One front-end with its driver, from connection to disconnection.
    fn session(&self, socket: &Path, rng: &mut fastrand::Rng) -> Result<(u64, u64)> {
        let ram = Ram::new([self.region.clone()])?;
        let mut arena = self.region.arena();
        let front_end = FrontEnd::connect(socket, &ram, Options::default())?;
        front_end.connection().wire().set_timeout(HANG)?;
        let mut driver = Driver::new(&ram, &mut arena, &front_end)?;
        for (index, vring) in driver.vrings.iter().enumerate() {
            front_end.start_vring(index as u16, &vring.layout(), vring.eventfds(), 0)?;
        }
        let steps = rng.u64(1..150);
        for _ in 0..steps {
            // What the broker refuses ends the session: it may, and the next one is served.
            if driver.step(&front_end, rng).is_err() {
                break;
            }
        }
        if rng.bool() {
            for index in 0..QUEUES {
                let start = Instant::now();
                let _ = front_end.stop_vring(index);
                ensure!(start.elapsed() < HANG, "stopping vring {index} hangs");
            }
        }
        Ok((steps, driver.opened))
    }
}

/// Control page and areas of one queue.
#[derive(Clone, Copy)]
struct Places {
    control: u64,
    areas: [[u64; 2]; 2],
}

struct Driver {
    ram: Ram,
    vrings: Vec<DriverVring>,
    places: Vec<Places>,
    /// Header and payload, answer, status.
    request_gpa: u64,
    /// Times that a ring was there shortly after it was asked for.
    opened: u64,
}

const SQ_ENTRIES: u32 = 16;
const CQ_ENTRIES: u32 = 32;

impl Driver {
    fn new(ram: &Ram, arena: &mut Arena, front_end: &FrontEnd) -> Result<Self> {
        let mut vrings = Vec::new();
        let mut places = Vec::new();
        for _ in 0..QUEUES {
            let layout = VringLayout::take(arena, 64)?;
            vrings.push(DriverVring::new(ram, layout, front_end.has_event_idx(), Eventfds::new()?)?);
            let mut page = || arena.take(4096, 4096);
            places.push(Places { control: page()?, areas: [[page()?, page()?], [page()?, page()?]] });
        }
        for place in &places {
            for gpa in place.pages() {
                ram.memory().write_slice(&[0; 4096], GuestAddress(gpa))?;
            }
        }
        Ok(Self { ram: ram.clone(), vrings, places, request_gpa: arena.take(64 << 10, 4096)?, opened: 0 })
    }

    fn step(&mut self, front_end: &FrontEnd, rng: &mut fastrand::Rng) -> Result<()> {
        let queue = rng.usize(..self.vrings.len());
        match rng.u8(0..32) {
            0..=5 => self.attach(queue.max(1), rng),
            6 => self.send(queue, T_ARM, &[], rng),
            7..=8 => self.send(0, T_EVENT, &[], rng),
            9 => self.send(queue, [T_PROBE, T_EVENT, T_ATTACH, rng.u32(..)][rng.usize(..4)], &random(rng, 80), rng),
            10 => {
                let payload = DetachPayload { queue: rng.u16(0..4).into(), ..DetachPayload::default() };
                self.ram.memory().write_obj(1_u32, GuestAddress(self.places[queue].control + 260))?;
                self.send(0, T_DETACH, &payload.to_bytes(), rng)
            }
            11..=13 => self.scribble(self.places[queue].control, rng),
            14..=16 => self.scribble(self.places[queue].areas[rng.usize(..2)][0], rng),
            17..=22 => self.submit(queue, rng),
            23 => self.acknowledge(queue, rng),
            24 => self.scribble(self.vrings[queue].layout().avail_gpa, rng),
            25 => self.scribble(self.vrings[queue].layout().desc_gpa, rng),
            26..=27 => (0..rng.usize(1..50)).try_for_each(|_| self.vrings[queue].kick()),
            28 => {
                let vring = &self.vrings[queue];
                let start = Instant::now();
                let base = front_end.stop_vring(queue as u16)?;
                ensure!(start.elapsed() < HANG, "stopping vring {queue} takes {:?}", start.elapsed());
                let base = if rng.bool() { base } else { rng.u16(..) };
                front_end.start_vring(queue as u16, &vring.layout(), vring.eventfds(), base)
            }
            29 => {
                let region = RamRegion::new(u64::from(rng.u8(2..6)) << 29, 4 * MIB)?;
                front_end.connection().add_mem_reg(&region.message(), region.file())?;
                self.submit(queue, rng)?;
                front_end.connection().rem_mem_reg(&region.message(), Some(region.file()))
            }
            _ => {
                std::thread::sleep(Duration::from_micros(rng.u64(..3000)));
                Ok(())
            }
        }
    }

    /// A request of the interface, mostly well-formed, on any queue.
    fn send(&mut self, queue: usize, kind: u32, payload: &[u8], rng: &mut fastrand::Rng) -> Result<()> {
        let at = self.request_gpa + rng.u64(..8) * 4096;
        let memory = self.ram.memory();
        memory.write_slice(&header(kind, 0), GuestAddress(at))?;
        memory.write_slice(payload, GuestAddress(at + 16))?;
        let answer_bytes = [16, 56, 8, rng.u32(..64)][rng.usize(..4)];
        let chain = [
            Descriptor::readable(at, 16 + payload.len() as u32),
            Descriptor::writable(at + 2048, answer_bytes),
            Descriptor::writable(at + 4000, 1),
        ];
        let vring = &mut self.vrings[queue];
        while vring.take_used()?.is_some() {}
        if !vring.has_room(chain.len()) {
            return Ok(());
        }
        vring.add(&chain)?;
        vring.publish_quietly()?;
        vring.kick()
    }

    /// ARM and ATTACH, as they should be or wrong in a field or two.
    fn attach(&mut self, queue: usize, rng: &mut fastrand::Rng) -> Result<()> {
        let Places { control, areas } = self.places[if rng.u8(..8) == 0 { rng.usize(..3) } else { queue }];
        let area = |area: [u64; 2]| AreaAddress { rings_gpa: area[0].into(), sqes_gpa: area[1].into() };
        let payload = AttachPayload {
            sq_entries: SQ_ENTRIES.into(),
            cq_entries: CQ_ENTRIES.into(),
            control_gpa: control.into(),
            areas: areas.map(area),
            ..AttachPayload::default()
        };
        let mut bytes = payload.to_bytes().to_vec();
        if rng.u8(..3) == 0 {
            let numbers = [0, 1, 0xfff, 4096, PART_BYTES, RAM_GPA, RAM_GPA + PART_BYTES, 1 << 30, 1 << 44, u64::MAX];
            for _ in 0..rng.usize(1..3) {
                let number = if rng.bool() { rng.u64(..) } else { numbers[rng.usize(..numbers.len())] };
                let at = rng.usize(..bytes.len() / 8) * 8;
                bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            }
        }
        if rng.bool() {
            self.ram.memory().write_slice(&[0; 512], GuestAddress(control))?;
        }
        if rng.u8(..8) > 0 {
            self.send(queue, T_ARM, &[], rng)?;
        }
        self.send(queue, T_ATTACH, &bytes, rng)?;
        // Long enough for a ring now and then.
        std::thread::sleep(Duration::from_micros(rng.u64(..16_000)));
        let announced: u32 = self.ram.memory().read_obj(GuestAddress(control))?;
        self.opened += u64::from(announced == OPEN_1);
        Ok(())
    }

    /// SQEs of any bytes, and indexes that say that they are there, whether a ring is or not.
    fn submit(&self, queue: usize, rng: &mut fastrand::Rng) -> Result<()> {
        let memory = self.ram.memory();
        for [rings, sqes] in self.places[queue].areas {
            for slot in 0..rng.u64(1..=SQ_ENTRIES.into()) {
                let mut bytes = random(rng, size_of::<Sqe>());
                if rng.u8(..4) > 0 {
                    // A fixed read or write of the disk, into or out of memory that may be the guest's.
                    bytes[..8].copy_from_slice(&[4 + rng.u8(..2), 1, 0, 0, 0, 0, 0, 0]);
                    bytes[8..16].copy_from_slice(&rng.u64(..DISK_BYTES).to_ne_bytes());
                    let addr = (1_u64 << 45) + RAM_GPA + rng.u64(..2 * PART_BYTES) - PART_BYTES / 2;
                    bytes[16..24].copy_from_slice(&addr.to_ne_bytes());
                    bytes[24..28].copy_from_slice(&rng.u32(..64 << 10).to_ne_bytes());
                    bytes[28..32].fill(0);
                    bytes[40..].fill(0);
                }
                memory.write_slice(&bytes, GuestAddress(sqes + slot * 64))?;
            }
            // The SQ tail is somewhere in the first words; so is what else a guest can forge.
            let word = rng.u64(..80) * 4;
            let value: u32 = memory.read_obj(GuestAddress(rings + word))?;
            memory.write_obj(value.wrapping_add(rng.u32(1..40)), GuestAddress(rings + word))?;
        }
        self.vrings[queue].kick()
    }

    /// What the device waits for, from now or from another time.
    fn acknowledge(&self, queue: usize, rng: &mut fastrand::Rng) -> Result<()> {
        let memory = self.ram.memory();
        let control = self.places[queue].control;
        let announced: u32 = memory.read_obj(GuestAddress(control))?;
        let word = [announced, announced | 3, announced.wrapping_add(4), rng.u32(..)][rng.usize(..4)];
        memory.write_obj(word, GuestAddress(control + 256))?;
        self.vrings[queue].kick()
    }

    fn scribble(&self, page_gpa: u64, rng: &mut fastrand::Rng) -> Result<()> {
        let len = [4, 8, 64, 512][rng.usize(..4)];
        let bytes = random(rng, len);
        Ok(self.ram.memory().write_slice(&bytes, GuestAddress(page_gpa + rng.u64(..128) * 4))?)
    }
}

impl Places {
    fn pages(&self) -> impl Iterator<Item = u64> {
        std::iter::once(self.control).chain(self.areas.into_iter().flatten())
    }
}

fn random(rng: &mut fastrand::Rng, len: usize) -> Vec<u8> {
    (0..len).map(|_| rng.u8(..)).collect()
}

/// The messages of a session with two rings, of which the front-end sends more each time, and then is gone.
fn disconnects() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&arguments("sq-thread"))?;
    broker.explain((|| {
        serve_honestly(&rig.socket(), Seed::fixed(1))?;
        let fds = broker.usage()?.fds;
        let memory = HostileRam::new()?;
        let mut messages = 0;
        while one_message_more(&rig.socket(), &memory, messages)? {
            messages += 1;
            if messages % 8 == 0 {
                serve_honestly(&rig.socket(), Seed::fixed(1)).with_context(|| format!("after {messages} messages"))?;
            }
        }
        eprintln!("{messages} places to go away at");
        ensure!(messages > 20, "only {messages} messages");
        serve_honestly(&rig.socket(), Seed::fixed(1))?;
        broker.wait_for_fds(fds)?;
        await_unpinned(&broker)?;
        memory.check_canaries()
    })())
}

/// A session that ends after `last` steps, without a word. False: it was whole.
fn one_message_more(socket: &Path, memory: &HostileRam, last: usize) -> Result<bool> {
    use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
    let mut left = last;
    let mut go_on = || {
        let goes_on = left > 0;
        left = left.saturating_sub(1);
        goes_on
    };
    macro_rules! step {
        ($step:expr) => {
            if !go_on() {
                return Ok(true);
            }
            $step?;
        };
    }
    let ram = Ram::new([memory.region.clone()])?;
    let mut arena = memory.region.arena();
    step!(Ok::<(), anyhow::Error>(()));
    let mut connection = ringpass_tests::front_end::connection::Connection::open(socket)?;
    step!(connection.features());
    let protocol = connection.protocol_features()? & VhostUserProtocolFeatures::all();
    step!(connection.set_protocol_features(protocol));
    step!(connection.set_owner());
    step!(connection.set_features(1 << 32 | 1 << 30));
    drop(connection);

    // The same again with rings, from where a front-end that is ready goes on.
    let front_end = FrontEnd::connect(socket, &ram, Options::default())?;
    let mut driver = Driver::new(&ram, &mut arena, &front_end)?;
    for index in 0..usize::from(QUEUES) {
        let (layout, eventfds) = (driver.vrings[index].layout(), driver.vrings[index].eventfds().clone());
        let (index, connection) = (index as u16, front_end.connection());
        step!(connection.set_vring(FrontendReq::SET_VRING_NUM, index, layout.size.into()));
        step!(connection.set_vring(FrontendReq::SET_VRING_BASE, index, 0));
        step!(connection.set_vring_addr(&front_end.vring_addr(index, &layout, false)?));
        use std::os::fd::AsFd;
        step!(connection.set_vring_fd(FrontendReq::SET_VRING_CALL, index, Some(eventfds.call().as_fd())));
        step!(connection.set_vring_fd(FrontendReq::SET_VRING_KICK, index, Some(eventfds.kick().as_fd())));
        step!(connection.set_vring(FrontendReq::SET_VRING_ENABLE, index, 1));
    }
    let mut rng = fastrand::Rng::with_seed(last as u64);
    for queue in [1, 2] {
        let Places { control, areas } = driver.places[queue];
        let area = |area: [u64; 2]| AreaAddress { rings_gpa: area[0].into(), sqes_gpa: area[1].into() };
        let payload = AttachPayload {
            sq_entries: SQ_ENTRIES.into(),
            cq_entries: CQ_ENTRIES.into(),
            control_gpa: control.into(),
            areas: areas.map(area),
            ..AttachPayload::default()
        };
        step!(driver.send(queue, T_ARM, &[], &mut rng));
        step!(driver.send(queue, T_ATTACH, &payload.to_bytes(), &mut rng));
        step!(await_open(&ram, control));
    }
    step!(front_end.stop_vring(2));
    step!(front_end.stop_vring(1));
    step!(front_end.stop_vring(0));
    let region = memory.region.message();
    step!(front_end.connection().rem_mem_reg(&region, Some(memory.region.file())));
    Ok(false)
}

/// Waits until the device announces the first epoch.
fn await_open(ram: &Ram, control: u64) -> Result<()> {
    let end = Instant::now() + HANG;
    loop {
        let word: u32 = ram.memory().read_obj(GuestAddress(control))?;
        if word == OPEN_1 {
            return Ok(());
        }
        ensure!(Instant::now() < end, "no ring: the device says {word:#x}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
