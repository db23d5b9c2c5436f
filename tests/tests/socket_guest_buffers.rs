//! Buffers of the user-space driver. An application allocates and drops them for as long as it runs.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_guest::{
    AllocateError,
    vhost_user::{Done, Error, ExecutedBy, Operation, Queue, Way},
};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::rig::Rig,
    harness::{self, Test, test},
    needs::Need,
    seed::Seed,
    socket_guest::{connect, options},
};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 16 * MIB;
const RAM_BYTES: u64 = 4 * MIB;
const BLOCK_BYTES: u64 = 64 << 10;
const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES;
const DEPTH: usize = 8;
/// Longer than any request takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

type Body = fn(&Rig, &BrokerProcess) -> Result<()>;

fn main() -> ExitCode {
    let with = |name: &str, mode: &'static str, body: Body| -> Test {
        let needs = DiskKind::Ext4PageCache.needs().into_iter().chain(broker_process::needs());
        test(name, needs.chain([Need::cpus(2)]), move || {
            let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
            let broker = rig.broker(&["--mode", mode, "--num-queues", "2"])?;
            broker.explain(body(&rig, &broker))
        })
    };
    harness::run(vec![
        with("an_application_allocates_and_drops_buffers_for_ever_and_never_runs_out_of_memory", "direct", for_ever),
        with("a_queue_dropped_with_requests_in_flight_frees_their_buffers_and_can_be_opened_again", "direct", dropped),
        with("a_queue_that_was_refused_a_ring_can_be_opened_again", "virtqueue", refused),
        with("a_queue_that_lacked_memory_for_a_ring_can_be_opened_again", "direct", no_memory),
    ])
}

/// What the test knows of a request in flight.
struct Expected {
    is_write: bool,
    block: u64,
    len_bytes: usize,
    byte: u8,
}

/// Writes and reads random lengths, each in a buffer of its own. Rings end meanwhile.
fn for_ever(rig: &Rig, _: &BrokerProcess) -> Result<()> {
    let mut rng = fastrand::Rng::with_seed(Seed::from_env_or_random().value());
    let disk = connect(&rig.socket(), options(1, RAM_BYTES, Way::Ring))?;
    let mut queue = disk.queue(1)?;
    let free_bytes = disk.free_bytes();
    // The beginning of each block: the value of the last write and its length, at least one page.
    let mut content = vec![(0_u8, 4096_usize); BLOCKS as usize];
    let mut under_way: BTreeMap<u64, Expected> = BTreeMap::new();
    let (mut allocated_bytes, mut tag) = (0, 0);
    let rounds = harness::budget(4_000, 1_000_000);
    for round in 0..rounds {
        while queue.outstanding() < DEPTH {
            let block = rng.u64(..BLOCKS);
            if under_way.values().any(|request| request.block == block) {
                continue;
            }
            let is_write = rng.bool();
            let (byte, known_bytes) = content[block as usize];
            let (byte, len_bytes) = if is_write { (rng.u8(..), rng.usize(1..=16) * 4096) } else { (byte, known_bytes) };
            let mut buffer = disk.allocate(len_bytes as u64)?;
            allocated_bytes += buffer.len_bytes();
            let bytes = buffer.bytes_mut(0, len_bytes as u64).context("a buffer is as long as was asked")?;
            bytes.fill(if is_write { byte } else { !byte });
            tag += 1;
            let operation = if is_write { Operation::Write } else { Operation::Read };
            let submitted = queue.submit(operation, buffer, block * BLOCK_BYTES, len_bytes as u32, tag);
            ensure!(submitted.is_ok(), "the queue refuses one of {DEPTH} requests");
            under_way.insert(tag, Expected { is_write, block, len_bytes, byte });
        }
        let done = queue.wait(PATIENCE).context("nothing ends")?;
        finish(done, &mut under_way, &mut content)?;
        if round % 500 == 499 {
            disk.pause_and_resume()?;
        }
    }
    while queue.outstanding() > 0 {
        let done = queue.wait(PATIENCE).context("nothing ends")?;
        finish(done, &mut under_way, &mut content)?;
    }
    let epochs = queue.counters().epochs;
    eprintln!("{} MiB in buffers of {} MiB of RAM, {epochs} rings", allocated_bytes / MIB, RAM_BYTES / MIB);
    ensure!(epochs > 1, "no ring ended meanwhile");
    ensure!(allocated_bytes > 20 * RAM_BYTES, "the buffers were too few to run out of memory");
    ensure!(disk.free_bytes() == free_bytes, "{} of {free_bytes} bytes are free again", disk.free_bytes());
    Ok(())
}

fn finish(done: Done, under_way: &mut BTreeMap<u64, Expected>, content: &mut [(u8, usize)]) -> Result<()> {
    let Done { tag, result, mut buffer, .. } = done;
    let request = under_way.remove(&tag).with_context(|| format!("request {tag} ended twice"))?;
    let Expected { is_write, block, len_bytes, byte } = request;
    ensure!(result? as usize == len_bytes, "request {tag} was cut short");
    let bytes = buffer.bytes_mut(0, len_bytes as u64).context("the buffer is as long as before")?;
    let wrong = bytes.iter().position(|&found| found != byte);
    ensure!(wrong.is_none(), "byte {wrong:?} of block {block} is wrong (a write: {is_write})");
    if is_write {
        content[block as usize] = (byte, len_bytes);
    }
    Ok(())
}

/// Does one read, whose content does not matter.
fn read(disk: &ringpass_guest::vhost_user::Disk, queue: &mut Queue) -> Result<()> {
    ensure!(
        queue.submit(Operation::Read, disk.allocate(4096)?, 0, 4096, 1).is_ok(),
        "the empty queue refuses a request"
    );
    ensure!(queue.wait(PATIENCE).context("nothing ends")?.result? == 4096);
    Ok(())
}

fn dropped(rig: &Rig, _: &BrokerProcess) -> Result<()> {
    let disk = connect(&rig.socket(), options(1, RAM_BYTES, Way::Ring))?;
    let mut queue = disk.queue(1)?;
    let free_bytes = disk.free_bytes();
    for _ in 0..harness::budget(20, 1_000) {
        for tag in 0..DEPTH as u64 {
            let buffer = disk.allocate(BLOCK_BYTES)?;
            let submitted = queue.submit(Operation::Read, buffer, tag * BLOCK_BYTES, BLOCK_BYTES as u32, tag);
            ensure!(submitted.is_ok(), "the queue refuses one of {DEPTH} requests");
        }
        queue.send();
        drop(queue);
        // Only the driver itself reaps the completions of these requests.
        let end = Instant::now() + PATIENCE;
        while disk.free_bytes() != free_bytes {
            ensure!(Instant::now() < end, "{} of {free_bytes} bytes are free again", disk.free_bytes());
            thread::sleep(Duration::from_millis(1));
        }
        queue = disk.queue(1)?;
        ensure!(matches!(queue.executed_by(), ExecutedBy::Ring { .. }), "{:?}", queue.executed_by());
        ensure!(queue.outstanding() == 0, "{} requests of the queue that was dropped", queue.outstanding());
        read(&disk, &mut queue)?;
    }
    ensure!(matches!(disk.queue(1), Err(Error::NoQueue { .. })), "a queue has two users at a time");
    Ok(())
}

fn refused(rig: &Rig, _: &BrokerProcess) -> Result<()> {
    let disk = connect(&rig.socket(), options(1, RAM_BYTES, Way::Ring))?;
    for _ in 0..2 {
        match disk.queue(1) {
            Err(Error::Lacks { .. }) => {}
            other => bail!("a device without rings gives a ring: {other:?}"),
        }
    }
    Ok(())
}

fn no_memory(rig: &Rig, _: &BrokerProcess) -> Result<()> {
    let disk = connect(&rig.socket(), options(1, RAM_BYTES, Way::Ring))?;
    let mut all = Vec::new();
    while disk.free_bytes() > 0 {
        all.push(disk.allocate(4096)?);
    }
    let before = all.len();
    for _ in 0..2 {
        match disk.queue(1) {
            Err(Error::Allocate(AllocateError::NoRoom { free_bytes: 0, .. })) => {}
            other => bail!("the driver got a ring without memory for it: {other:?}"),
        }
    }
    // Every second page is free: enough memory in all, but no piece is long enough.
    let mut number = 0;
    all.retain(|_| {
        number += 1;
        number % 2 == 0
    });
    let message = disk.allocate(8192).err().context("there are no two pages in a row")?.to_string();
    let free_bytes = (before - all.len()) * 4096;
    ensure!(message.contains(&format!("{free_bytes} bytes are free, the longest piece has 4096")), "{message}");
    drop(all);
    let mut queue = disk.queue(1)?;
    read(&disk, &mut queue)
}
