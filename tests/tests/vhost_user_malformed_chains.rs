//! Descriptor chains of a hostile driver: each gets the status that VIRTIO says, or stops its own queue and no other, and
//! the device writes nowhere but where the chain lets it.

use std::{
    os::fd::AsFd,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    front_end::{
        blk::{BlkDriver, SECTOR_BYTES, header, range},
        descriptor::{Descriptor, F_INDIRECT, F_NEXT, F_WRITE},
        event::Event,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
    },
    harness::{self, Test, test},
    seed::Seed,
};
use vhost::vhost_user::message::FrontendReq;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress};

const DISK_BYTES: u64 = 4 << 20;
const SECTORS: u64 = DISK_BYTES / SECTOR_BYTES;
const REGION_BYTES: u64 = 2 << 20;
const QUEUE_SIZE: u16 = 128;
/// Guest-physical address at which there is no RAM.
const NOWHERE_GPA: u64 = 1 << 40;
const CANARY: u8 = 0xc5;

fn main() -> ExitCode {
    let needs = || DiskKind::Ext4Direct.needs().into_iter().chain(broker_process::needs());
    let tests: Vec<Test> = vec![
        test("malformed_requests_get_the_status_of_the_specification", needs(), || with_bench(statuses)),
        test("a_flood_of_one_error_does_not_hide_another_in_the_log", needs(), flood),
        test("chains_that_cannot_be_answered_stop_their_queue_and_no_other", needs(), || with_bench(stops)),
        test("random_chains_are_answered_or_stop_their_queue_and_write_nowhere_else", needs(), || with_bench(random)),
    ];
    harness::run(tests)
}

fn with_bench(body: fn(&mut Bench) -> Result<()>) -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "2"])?;
    let result = Bench::new(&rig).and_then(|mut bench| {
        body(&mut bench)?;
        bench.check_canaries()?;
        ensure!(rig.disk_file()?.metadata()?.len() == DISK_BYTES, "the disk has another size");
        Ok(())
    });
    broker.explain(result)
}

/// A hostile driver on queue 0, an honest one on queue 1.
struct Bench {
    ram: TestRam,
    front_end: FrontEnd,
    hostile: BlkDriver,
    honest: BlkDriver,
    /// Signalled when queue 0 stops.
    error: Event,
    /// RAM that no chain lets the device write, beside the data of the hostile driver.
    canary_gpa: u64,
    /// RAM for tables of descriptors.
    table_gpa: u64,
}

/// Length of the hostile driver's data, and of the canary behind it.
const DATA_BYTES: u32 = 64 << 10;

impl Bench {
    fn new(rig: &Rig) -> Result<Self> {
        let mut ram = TestRam::new(2, REGION_BYTES)?;
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        let honest = ram.driver(&front_end, 1, 4096)?;
        let hostile = ram.driver(&front_end, 0, DATA_BYTES)?;
        let canary_gpa = ram.arenas[0].take(DATA_BYTES.into(), 4096)?;
        let table_gpa = ram.arenas[0].take(DATA_BYTES.into(), 4096)?;
        ram.ram.memory().write_slice(&[CANARY; DATA_BYTES as usize], GuestAddress(canary_gpa))?;
        let error = Event::new()?;
        front_end.connection().set_vring_fd(FrontendReq::SET_VRING_ERR, 0, Some(error.as_fd()))?;
        Ok(Self { ram, front_end, hostile, honest, error, canary_gpa, table_gpa })
    }

    fn check_canaries(&self) -> Result<()> {
        let mut found = vec![0; DATA_BYTES as usize];
        self.ram.ram.memory().read_slice(&mut found, GuestAddress(self.canary_gpa))?;
        ensure!(found.iter().all(|&byte| byte == CANARY), "the device wrote where no chain lets it");
        Ok(())
    }

    /// The other queue is served.
    fn check_honest(&mut self) -> Result<()> {
        let sector = SECTORS - 8;
        self.honest.write(sector, &[0x42; 4096])?;
        ensure!(self.honest.read(sector, 4096)? == [0x42; 4096], "the honest queue reads something else");
        Ok(())
    }

    /// Makes what is in the descriptor table available under `head`, and waits until it is used or the queue stops.
    fn send_raw(&mut self, head: u16) -> Result<Outcome> {
        let vring = self.hostile.vring();
        vring.add_head(head)?;
        vring.publish_quietly()?;
        vring.kick()?;
        self.outcome()
    }

    fn outcome(&mut self) -> Result<Outcome> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if self.error.wait(Duration::ZERO)? {
                return Ok(Outcome::Stopped);
            }
            if self.hostile.vring().take_used()?.is_some() {
                return Ok(Outcome::Answered(self.hostile.status()?));
            }
            ensure!(Instant::now() < end, "neither an answer nor a stop");
            thread::yield_now();
        }
    }

    /// Stops queue 0, in whatever state it is, and starts it empty.
    fn restart(&mut self) -> Result<()> {
        self.front_end.stop_vring(0)?;
        self.error.take()?;
        let vring = self.hostile.vring();
        // What was not answered is forgotten.
        vring.reset()?;
        let (layout, eventfds) = (vring.layout(), vring.eventfds().clone());
        self.front_end.start_vring(0, &layout, &eventfds, 0)
    }

    fn put(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.ram.ram.memory().write_slice(bytes, GuestAddress(gpa))?)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Answered(u8),
    Stopped,
}

/// What stands between header and status, and the header itself.
struct Case {
    name: &'static str,
    kind: u32,
    sector: u64,
    data: Vec<Descriptor>,
    status: u32,
}

fn statuses(bench: &mut Bench) -> Result<()> {
    let data = bench.hostile.data_gpa();
    let region_end = REGION_BYTES;
    let readable = |gpa, len| vec![Descriptor::readable(gpa, len)];
    let writable = |gpa, len| vec![Descriptor::writable(gpa, len)];
    let case = |name, kind, sector, data, status| Case { name, kind, sector, data, status };
    // Where the ranges of discards and write zeroes are.
    let ranges = bench.table_gpa;
    let ranges_at = |index: u64| ranges + 16 * index;
    let contents = [
        range(0, 8, 0),
        range(0, 8, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
        range(0, 8, 0x8000_0000),
        range(SECTORS - 1, 8, 0),
        range(u64::MAX - 3, 8, 0),
        range(0, u32::MAX, 0),
    ];
    for (index, content) in (0u64..).zip(&contents) {
        bench.put(ranges_at(index), content)?;
    }
    let (ok, ioerr, unsupp) = (VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP);
    let (read, write) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT);
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    let cases = [
        case("a read", read, 0, writable(data, 4096), ok),
        case("a read into no RAM", read, 0, writable(NOWHERE_GPA, 4096), ioerr),
        case("a read past the end of RAM", read, 0, writable(region_end - 512, 4096), ioerr),
        case("a read past the last address", read, 0, writable(u64::MAX - 100, 4096), ioerr),
        case("a write from no RAM", write, 0, readable(NOWHERE_GPA, 4096), ioerr),
        case("a read of half a sector", read, 0, writable(data, 256), ioerr),
        case("a write of a sector and a byte", write, 0, readable(data, 513), ioerr),
        case("a read of readable memory", read, 0, readable(data, 4096), ioerr),
        case("a write of writable memory", write, 0, writable(data, 4096), ioerr),
        case("a read of the last sector", read, SECTORS - 8, writable(data, 4096), ok),
        case("a read past the disk", read, SECTORS - 7, writable(data, 4096), ioerr),
        case("a write past the disk", write, SECTORS, readable(data, 512), ioerr),
        case("a read at the last sector number", read, u64::MAX, writable(data, 512), ioerr),
        case("a write at the last offset", write, u64::MAX / SECTOR_BYTES, readable(data, 512), ioerr),
        case("a read of almost 4 GiB", read, 0, writable(data, !511), ioerr),
        case("an unknown type", 99, 0, writable(data, 512), unsupp),
        case("the largest type", u32::MAX, 0, vec![], unsupp),
        case("readable memory after writable", read, 0, [writable(data, 512), readable(data, 512)].concat(), ioerr),
        case("a flush", VIRTIO_BLK_T_FLUSH, 0, vec![], ok),
        case("an id", VIRTIO_BLK_T_GET_ID, 0, writable(data, 20), ok),
        case("an id with too little room", VIRTIO_BLK_T_GET_ID, 0, writable(data, 19), ioerr),
        case("a discard", discard, 0, readable(ranges_at(0), 16), ok),
        case("a discard with unmap", discard, 0, readable(ranges_at(1), 16), unsupp),
        case("a discard with an unknown flag", discard, 0, readable(ranges_at(2), 16), unsupp),
        case("write zeroes with unmap", zeroes, 0, readable(ranges_at(1), 16), ok),
        case("write zeroes with an unknown flag", zeroes, 0, readable(ranges_at(2), 16), unsupp),
        case("a discard past the disk", discard, 0, readable(ranges_at(3), 16), ioerr),
        case("write zeroes past the last sector", zeroes, 0, readable(ranges_at(4), 16), ioerr),
        case("write zeroes of 2 TiB", zeroes, 0, readable(ranges_at(5), 16), ioerr),
        case("a discard without a range", discard, 0, vec![], ioerr),
        case("a discard of half a range", discard, 0, readable(ranges_at(0), 8), ioerr),
        case("a discard from no RAM", discard, 0, readable(NOWHERE_GPA, 16), ioerr),
    ];
    for Case { name, kind, sector, data, status } in cases {
        let answer = bench.hostile.request(kind, sector, &data).with_context(|| name.to_owned())?;
        ensure!(u32::from(answer.status) == status, "{name}: {answer:?} instead of status {status}");
        // Nothing was written of what failed, and the status counts only behind what was (VIRTIO 1.2, 2.7.8.2).
        let room_bytes: u64 =
            data.iter().filter(|buffer| buffer.flags & F_WRITE != 0).map(|buffer| u64::from(buffer.len_bytes)).sum();
        let used_bytes = if status == ok || room_bytes == 0 { room_bytes + 1 } else { 0 };
        ensure!(u64::from(answer.len_bytes) == used_bytes, "{name}: {answer:?} instead of {used_bytes} bytes");
    }
    let header_gpa = bench.hostile.header_gpa();
    for (name, header) in [
        ("a header of 15 bytes", Descriptor::readable(header_gpa, 15)),
        ("a header in no RAM", Descriptor::readable(NOWHERE_GPA, 16)),
        ("a header past the end of RAM", Descriptor::readable(region_end - 8, 16)),
    ] {
        bench.hostile.put_header(read, 0)?;
        let chain = [header, Descriptor::writable(data, 512), bench.hostile.put_status()?];
        bench.hostile.send(&chain).with_context(|| name.to_owned())?;
        let status = bench.hostile.status()?;
        ensure!(u32::from(status) == ioerr, "{name}: status {status}");
    }
    ensure!(!bench.error.wait(Duration::ZERO)?, "the queue has stopped");
    bench.check_honest()
}

/// Both errors are refused requests: a limit for all of these let the second one wait for ten seconds.
fn flood() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "2"])?;
    let result = Bench::new(&rig).and_then(|mut bench| {
        let data = bench.hostile.data_gpa();
        for len_bytes in (1..200).chain(1..200) {
            bench.hostile.request(VIRTIO_BLK_T_IN, 0, &[Descriptor::writable(data, len_bytes)])?;
        }
        bench.hostile.request(VIRTIO_BLK_T_IN, SECTORS, &[Descriptor::writable(data, 512)])?;
        broker.wait_for_log("end beyond the capacity of the disk")?;
        let lines = broker.log().lines().filter(|line| line.contains("cannot have")).count();
        // One in ten seconds.
        ensure!(lines < 20, "{lines} lines for a flood of one error");
        Ok(())
    });
    broker.explain(result)
}

/// Writes a chain that cannot be answered, and makes it available.
type Stop = fn(&mut Bench) -> Result<()>;

fn stops(bench: &mut Bench) -> Result<()> {
    let cases: [(&str, Stop); 16] = [
        ("a loop", |bench| chain(bench, &[(0, F_NEXT, 1), (0, F_NEXT, 0)])),
        ("a descriptor that follows itself", |bench| chain(bench, &[(0, F_NEXT, 0)])),
        ("a next descriptor past the table", |bench| chain(bench, &[(0, F_NEXT, QUEUE_SIZE)])),
        ("no writable byte", |bench| chain(bench, &[(0, 0, 0)])),
        ("a status in no RAM", |bench| table_of(bench, |_, _| Descriptor::writable(NOWHERE_GPA, 1))),
        ("more than 4 GiB", |bench| table_of(bench, |_, gpa| Descriptor::writable(gpa, u32::MAX))),
        ("a head past the table", |bench| head(bench, QUEUE_SIZE)),
        ("the largest head", |bench| head(bench, u16::MAX)),
        ("an index far ahead", |bench| {
            let vring = bench.hostile.vring();
            let index = vring.next_avail().wrapping_add(QUEUE_SIZE + 1);
            vring.write_avail_idx(index)?;
            vring.kick()
        }),
        ("an indirect table in no RAM", |bench| indirect(bench, NOWHERE_GPA, 32, 0)),
        ("an empty indirect table", |bench| indirect(bench, bench.table_gpa, 0, 0)),
        ("an indirect table of 24 bytes", |bench| indirect(bench, bench.table_gpa, 24, 0)),
        ("an indirect table with a next descriptor", |bench| indirect(bench, bench.table_gpa, 32, F_NEXT)),
        ("an indirect table of 4 GiB", |bench| indirect(bench, bench.table_gpa, !15, 0)),
        ("an indirect table in an indirect table", |bench| {
            let inner = Descriptor { flags: F_INDIRECT, ..Descriptor::readable(bench.table_gpa, 16) };
            bench.put(bench.table_gpa, &inner.to_bytes())?;
            indirect(bench, bench.table_gpa, 16, 0)
        }),
        ("a loop in an indirect table", |bench| {
            let looped = Descriptor { flags: F_NEXT, next: 0, ..Descriptor::readable(bench.hostile.header_gpa(), 16) };
            bench.put(bench.table_gpa, &looped.to_bytes())?;
            indirect(bench, bench.table_gpa, 16, 0)
        }),
    ];
    for (name, send) in cases {
        bench.hostile.put_header(VIRTIO_BLK_T_IN, 0)?;
        send(bench).with_context(|| name.to_owned())?;
        let outcome = bench.outcome().with_context(|| name.to_owned())?;
        ensure!(outcome == Outcome::Stopped, "{name}: {outcome:?}");
        bench.check_honest().with_context(|| format!("the other queue after {name}"))?;
        bench.restart().with_context(|| format!("starting the queue after {name}"))?;
        bench.hostile.read(0, 4096).with_context(|| format!("the queue after {name}"))?;
    }
    Ok(())
}

/// Descriptors over the header, with these flags and next descriptors, from index 0 on.
fn chain(bench: &mut Bench, descriptors: &[(u64, u16, u16)]) -> Result<()> {
    let gpa = bench.hostile.header_gpa();
    for (index, &(offset, flags, next)) in (0u16..).zip(descriptors) {
        let descriptor = Descriptor { gpa: gpa + offset, len_bytes: 16, flags, next };
        bench.hostile.vring().write_descriptor(index, descriptor)?;
    }
    head(bench, 0)
}

/// A header, and what `last` makes of it.
fn table_of(bench: &mut Bench, last: fn(&Bench, u64) -> Descriptor) -> Result<()> {
    let gpa = bench.hostile.header_gpa();
    let status = last(bench, gpa);
    let vring = bench.hostile.vring();
    vring.write_descriptor(0, Descriptor { flags: F_NEXT, next: 1, ..Descriptor::readable(gpa, 16) })?;
    vring.write_descriptor(1, status)?;
    head(bench, 0)
}

fn indirect(bench: &mut Bench, gpa: u64, len_bytes: u32, more_flags: u16) -> Result<()> {
    let table = Descriptor { flags: F_INDIRECT | more_flags, ..Descriptor::readable(gpa, len_bytes) };
    bench.hostile.vring().write_descriptor(0, table)?;
    head(bench, 0)
}

fn head(bench: &mut Bench, head: u16) -> Result<()> {
    let vring = bench.hostile.vring();
    vring.add_head(head)?;
    vring.publish_quietly()?;
    vring.kick()
}

fn random(bench: &mut Bench) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let (mut answered, mut stopped) = (0, 0);
    for round in 0..harness::budget(5_000u64, 500_000) {
        let mut rng = seed.derive(round).rng();
        random_table(bench, &mut rng)?;
        bench.hostile.put_status()?;
        let head = if rng.u8(0..50) == 0 { rng.u16(..) } else { rng.u16(0..8) };
        match bench.send_raw(head).with_context(|| format!("round {round}"))? {
            Outcome::Answered(_) => answered += 1,
            Outcome::Stopped => {
                stopped += 1;
                bench.restart().with_context(|| format!("after round {round}"))?;
            }
        }
        if round % 200 == 0 {
            bench.check_honest().with_context(|| format!("after round {round}"))?;
            bench.check_canaries().with_context(|| format!("after round {round}"))?;
        }
    }
    // Both happen often, or the chains were not what they are meant to be.
    ensure!(answered > 100 && stopped > 100, "{answered} answered, {stopped} stopped");
    Ok(())
}

/// Eight descriptors and eight of an indirect table, each a little wrong now and then. Only the driver's own data may be
/// written: the canary behind it is only ever readable.
fn random_table(bench: &mut Bench, rng: &mut fastrand::Rng) -> Result<()> {
    let kinds =
        [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES];
    let kind = if rng.u8(0..10) == 0 { rng.u32(..) } else { kinds[rng.usize(..kinds.len())] };
    let sector = if rng.u8(0..10) == 0 { rng.u64(..) } else { rng.u64(0..SECTORS - 8) };
    bench.put(bench.hostile.header_gpa(), &header(kind, sector))?;
    for index in 0..8 {
        let descriptor = random_descriptor(bench, rng, index, 8);
        bench.hostile.vring().write_descriptor(index, descriptor)?;
        let mut inner = random_descriptor(bench, rng, index, 8);
        if rng.u8(0..20) > 0 {
            inner.flags &= !F_INDIRECT;
        }
        bench.put(bench.table_gpa + 16 * u64::from(index), &inner.to_bytes())?;
    }
    Ok(())
}

fn random_descriptor(bench: &Bench, rng: &mut fastrand::Rng, index: u16, count: u16) -> Descriptor {
    let position = rng.u8(0..100);
    let next = if rng.u8(0..20) == 0 { rng.u16(0..count + 2) } else { index + 1 };
    let (mut gpa, mut len_bytes, mut flags) = match position {
        0..30 => (bench.hostile.header_gpa(), 16, 0),
        30..45 => (bench.canary_gpa, 512 * rng.u32(0..8), 0),
        45..70 => (bench.hostile.data_gpa(), 512 * rng.u32(0..8), F_WRITE),
        70..90 => (bench.hostile.status_gpa(), 1, F_WRITE),
        90..98 => (bench.table_gpa, 16 * rng.u32(0..9), F_INDIRECT),
        _ => (NOWHERE_GPA, 4096, F_WRITE * rng.u16(0..2)),
    };
    if flags & F_INDIRECT == 0 && rng.u8(0..100) < 70 {
        flags |= F_NEXT;
    }
    if rng.u8(0..40) == 0 {
        flags ^= F_NEXT;
    }
    // Never so that the device may write the canary.
    if rng.u8(0..40) == 0 {
        len_bytes = if flags & F_WRITE == 0 { rng.u32(..) } else { rng.u32(0..DATA_BYTES / 2) };
    }
    if rng.u8(0..60) == 0 && flags & F_WRITE == 0 {
        gpa = rng.u64(..);
    }
    if flags & F_WRITE != 0 && gpa == bench.hostile.status_gpa() {
        len_bytes = 1;
    }
    Descriptor { gpa, len_bytes, flags, next }
}
