//! The broker as a process beside a VM: it resizes the disk, idles, ends, and sees guest memory come and go.

use std::{
    fs::File,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::{
        blk::SECTOR_BYTES,
        load::{BLOCK_BYTES, LoadOptions, RunningLoad},
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
    },
    harness::{self, Test, test},
    seed::Seed,
};
use rustix::{
    fs::{FallocateFlags, fallocate},
    process::Signal,
};
use vhost::vhost_user::message::{BackendReq, FrontendReq};

const DISK_BYTES: u64 = 16 << 20;
const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES;

type Body = fn(&Rig) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Body); 5] = [
        ("the_broker_tells_the_front_end_the_new_size_of_the_disk_on_a_signal", resize),
        ("the_broker_serves_a_front_end_that_does_not_read_its_channel", unread_channel),
        ("an_idle_broker_uses_no_cpu_time_and_little_memory", idle),
        ("the_broker_keeps_nothing_of_memory_that_the_front_end_discards", balloon),
        ("a_terminated_broker_finishes_its_io_and_exits_with_success", terminated),
    ];
    let tests: Vec<Test> = tests
        .into_iter()
        .map(|(name, body)| {
            let needs = DiskKind::Ext4Direct.needs().into_iter().chain(broker_process::needs());
            test(name, needs, move || body(&Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?))
        })
        .collect();
    harness::run(tests)
}

/// Changes the size of the disk's file and signals the broker.
fn resize_disk(rig: &Rig, broker: &mut BrokerProcess, size_bytes: u64) -> Result<()> {
    File::options().write(true).open(rig.disk().path())?.set_len(size_bytes)?;
    broker.signal(Signal::HUP)
}

fn capacity_bytes(front_end: &FrontEnd) -> Result<u64> {
    let config = front_end.connection().config(8)?;
    Ok(u64::from_le_bytes(config.try_into().expect("eight bytes")) * SECTOR_BYTES)
}

fn resize(rig: &Rig) -> Result<()> {
    let mut broker = rig.broker(&[])?;
    let mut ram = TestRam::new(1, 8 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    for size_bytes in [DISK_BYTES * 2, DISK_BYTES / 2, DISK_BYTES] {
        resize_disk(rig, &mut broker, size_bytes)?;
        let channel = front_end.backend().context("BACKEND_REQ is not negotiated")?;
        let message = broker.explain(channel.receive())?.context("the broker closed its channel")?;
        ensure!(message.request == BackendReq::CONFIG_CHANGE_MSG as u32, "{message:?}");
        ensure!(message.body.is_empty() && message.fds.is_empty(), "{message:?}");
        let capacity = broker.explain(capacity_bytes(&front_end))?;
        ensure!(capacity == size_bytes, "a capacity of {capacity} instead of {size_bytes}");
        let last = (size_bytes - 4096) / SECTOR_BYTES;
        broker.explain(driver.write(last, &[0x3c; 4096]))?;
        ensure!(driver.read(last, 4096)? == [0x3c; 4096], "the read at the new end returned other data");
        let beyond = driver.try_read(size_bytes / SECTOR_BYTES, 512)?;
        ensure!(beyond.status == 1, "a read beyond the end has {beyond:?}");
    }
    Ok(())
}

fn unread_channel(rig: &Rig) -> Result<()> {
    let mut broker = rig.broker(&[])?;
    let mut ram = TestRam::new(1, 8 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    // More messages than a socket holds (net.core.wmem_default counts some hundred bytes for each).
    for round in 0..1000u64 {
        let size_bytes = DISK_BYTES + (round % 2) * DISK_BYTES;
        resize_disk(rig, &mut broker, size_bytes)?;
        let end = Instant::now() + Duration::from_secs(20);
        while broker.explain(capacity_bytes(&front_end))? != size_bytes {
            ensure!(Instant::now() < end, "the capacity does not become {size_bytes}");
        }
        if round % 100 == 0 {
            broker.explain(driver.read(0, 4096))?;
        }
    }
    Ok(())
}

fn idle(rig: &Rig) -> Result<()> {
    /// The promised limit for anonymous memory and file pages together, without the guest's memory.
    const MEMORY_BYTES: u64 = 15 << 20;
    let broker = rig.broker(&["--num-queues", "4"])?;
    let mut ram = TestRam::new(1, 16 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let seed = Seed::from_env_or_random();
    for index in 0..4 {
        let options = LoadOptions::new(u64::from(index) * BLOCKS / 4, BLOCKS / 4, 64, seed.derive(index));
        broker.explain(ram.load(&front_end, index, 256, options)?.run(2000))?;
    }
    // Kernel threads that did I/O for the broker end after some seconds. The remaining threads must not run at all.
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let before = broker.usage()?;
        thread::sleep(Duration::from_secs(2));
        let after = broker.usage()?;
        let memory_bytes = after.anonymous_bytes + after.file_bytes;
        ensure!(memory_bytes < MEMORY_BYTES, "{memory_bytes} bytes of memory: {after:?}");
        if after.cpu_ns == before.cpu_ns {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the idle broker ran {} ns in 2 s", after.cpu_ns.saturating_sub(before.cpu_ns));
    }
}

fn balloon(rig: &Rig) -> Result<()> {
    const DATA_BYTES: u32 = 64 << 10;
    let broker = rig.broker(&["--num-queues", "2"])?;
    let mut ram = TestRam::new(2, 8 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 0, DATA_BYTES)?;
    let options = LoadOptions::new(BLOCKS / 2, BLOCKS / 2, 32, Seed::from_env_or_random());
    let load = RunningLoad::start(ram.load(&front_end, 1, 128, options)?);
    let region = &ram.ram.regions()[0];
    let data_gpa = driver.data_gpa();
    // A balloon does this with pages of the guest.
    let discard = || {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(region.file(), flags, data_gpa - region.gpa(), DATA_BYTES.into())
    };
    let zeroes = vec![0; DATA_BYTES as usize];
    let mut rounds = || -> Result<()> {
        for round in 0..harness::budget(300u32, 20_000) {
            let content: Vec<u8> = (0..DATA_BYTES).map(|at| (at / 7 + round) as u8).collect();
            driver.write(0, &content)?;
            discard()?;
            ensure!(driver.data(DATA_BYTES)? == zeroes, "the pages are still there");
            ensure!(driver.read(0, DATA_BYTES)? == content, "a read did not reach the guest's new pages");
            discard()?;
            driver.write_buffer(0, DATA_BYTES)?;
            ensure!(driver.read(0, DATA_BYTES)? == zeroes, "a write took pages that the guest no longer has");
        }
        Ok(())
    };
    broker.explain(rounds())?;
    broker.explain(load.finish())?.check_disk(&rig.disk_file()?)
}

fn terminated(rig: &Rig) -> Result<()> {
    let arguments = ["--num-queues", "1"];
    let mut ram = TestRam::new(2, 8 << 20)?;
    let mut broker = rig.broker(&arguments)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let region = front_end.new_inflight_region(1, 128)?;
    let mut load = ram.load(&front_end, 0, 128, LoadOptions::new(0, BLOCKS, 32, Seed::from_env_or_random()))?;
    let (layout, eventfds) = (load.vring().layout(), load.vring().eventfds().clone());
    let load = RunningLoad::start(load);
    let mut front_end = Some(front_end);
    for round in 0..harness::budget(10, 200) {
        load.wait_for_progress(200);
        let status = broker.terminate()?;
        ensure!(status.success(), "round {round}: {status}:\n{}", broker.log());
        ensure!(!rig.socket().exists(), "the socket is still there");
        ensure!(region.heads(0)?.is_empty(), "the broker ended with {:?} in flight", region.heads(0)?);
        drop(front_end.take());
        broker = rig.broker(&arguments)?;
        let again = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        again.set_inflight_region(&region)?;
        again.start_vring(0, &layout, &eventfds, layout.used_idx(&ram.ram)?)?;
        ensure!(again.connection().ask_u64(FrontendReq::GET_QUEUE_NUM)? == 1);
        front_end = Some(again);
    }
    broker.explain(load.finish())?.check_disk(&rig.disk_file()?)
}
