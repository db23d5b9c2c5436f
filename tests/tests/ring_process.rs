//! The process that makes the rings of a server's guests: what it has, and how the two end together.

use std::{
    fs,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_guest::vhost_user::Way;
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::{attach::bench::Bench, rig::Rig},
    harness::{self, budget, test},
    needs::Need,
    seed::Seed,
    socket_guest::{connect, options},
};
use rustix::process::{Pid, Signal, kill_process};

const DISK_BYTES: u64 = 4 << 20;
/// Guest memory whose pinning takes some tenths of a second.
const PINNED_BYTES: u64 = 1 << 30;
/// How long a process may take to end: much longer than it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// `CAP_IPC_LOCK` (`<linux/capability.h>`), which a ring process of root keeps if it cannot raise RLIMIT_MEMLOCK.
const IPC_LOCK: u64 = 1 << 14;

fn main() -> ExitCode {
    let needs = || DiskKind::Ext4PageCache.needs().into_iter().chain(broker_process::needs()).collect::<Vec<_>>();
    harness::run(vec![
        test("a_ring_process_has_no_privileges_no_disk_and_no_socket_of_the_server", needs(), has_little),
        test("a_server_without_rings_has_no_ring_process", needs(), without_rings),
        test("a_ring_process_ends_with_a_server_that_is_killed", needs(), ends_with_server),
        test("a_ring_process_outlives_the_signals_of_a_terminal_and_ends_with_its_server", needs(), ignores_signals),
        test("a_server_whose_ring_process_is_killed_ends_and_says_why", needs(), server_ends),
        test(
            "the_processes_end_together_and_free_the_disk_when_one_is_killed_while_it_pins_memory",
            needs().into_iter().chain([Need::available_memory_bytes(2 * PINNED_BYTES)]),
            killed_while_pinning,
        ),
    ])
}

fn ring_process(broker: &BrokerProcess) -> Result<u32> {
    broker.ring_process().context("the server has no ring process")
}

fn pid(number: u32) -> Result<Pid> {
    Pid::from_raw(number.try_into()?).context("no process has the number 0")
}

/// Waits until the process has ended. A process that nobody has waited for is a zombie.
fn await_end(number: u32) -> Result<()> {
    let start = Instant::now();
    let status = format!("/proc/{number}/status");
    while fs::read_to_string(&status).is_ok_and(|status| !status.contains("State:\tZ")) {
        ensure!(start.elapsed() < PATIENCE, "process {number} goes on");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn field<'s>(status: &'s str, name: &str) -> Result<&'s str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {name}"))?.trim())
}

/// What the links of a process's descriptors say.
fn open_files(number: u32) -> Result<Vec<String>> {
    let entries = fs::read_dir(format!("/proc/{number}/fd"))?;
    let links = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    Ok(links.map(|link| link.display().to_string()).collect())
}

fn has_little() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "direct", "--num-queues", "3"])?;
    let number = ring_process(&broker)?;
    for task in fs::read_dir(format!("/proc/{number}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let name = field(&status, "Name")?;
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"] {
            let set_bits = u64::from_str_radix(field(&status, set)?, 16)?;
            ensure!(set_bits & !IPC_LOCK == 0, "{set} of thread {name}: {set_bits:#x}");
        }
        ensure!(field(&status, "NoNewPrivs")? == "1", "thread {name}");
        ensure!(field(&status, "Seccomp")? == "2", "thread {name} is not filtered");
    }
    let files = open_files(number)?;
    let disk = rig.disk().path().canonicalize()?;
    ensure!(!files.iter().any(|file| Path::new(file) == disk), "it has the disk: {files:?}");
    // Its ends of the sockets to the server, and nothing that listens.
    let sockets = files.iter().filter(|file| file.starts_with("socket:")).count();
    ensure!(sockets == 3, "{sockets} sockets: {files:?}");
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt"));
    ensure!(namespace(&number.to_string())? != namespace("self")?, "it sees the machine's files");
    ensure!(namespace(&number.to_string())? != namespace(&broker.pid().to_string())?, "it sees the server's files");
    eprintln!("{} files: {}", files.len(), files.join(", "));
    Ok(())
}

fn without_rings() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "virtqueue"])?;
    let children = format!("/proc/{0}/task/{0}/children", broker.pid());
    ensure!(fs::read_to_string(&children).context("this kernel does not list children")?.is_empty());
    Ok(())
}

fn ends_with_server() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 3, &[])?;
    let mut driver = bench.attached(1)?;
    driver.write(0, &[0x5a; 4096])?;
    let number = ring_process(&bench.broker)?;
    bench.broker.kill()?;
    await_end(number)
}

fn ignores_signals() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let mut broker = rig.broker(&["--mode", "direct"])?;
    let number = ring_process(&broker)?;
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::ALARM] {
        kill_process(pid(number)?, signal)?;
    }
    thread::sleep(Duration::from_millis(50));
    ensure!(ring_process(&broker)? == number && broker.is_running()?);
    let status = broker.terminate()?;
    ensure!(status.success(), "{status}");
    await_end(number)
}

fn server_ends() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 3, &[])?;
    let mut driver = bench.attached(1)?;
    driver.write(0, &[0x5a; 4096])?;
    kill_process(pid(ring_process(&bench.broker)?)?, Signal::KILL)?;
    let status = bench.broker.wait()?;
    ensure!(status.code() == Some(1), "{status}");
    bench.broker.wait_for_log("the process that makes the guests' rings has ended")?;
    ensure!(!bench.broker.socket().exists(), "the socket is left");
    Ok(())
}

fn killed_while_pinning() -> Result<()> {
    let mut rng = Seed::from_env_or_random().rng();
    let mut while_pinning = 0;
    for round in 0..budget(6, 200) {
        let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
        let mut broker = rig.broker(&["--mode", "direct", "--num-queues", "2"])?;
        let number = ring_process(&broker)?;
        let guest = options(1, PINNED_BYTES, Way::Auto).patience(Duration::from_secs(1));
        let disk = connect(&rig.socket(), guest)?;
        // The driver asks for a ring and does not wait for it.
        let queue = disk.queue(1)?;
        thread::sleep(Duration::from_millis(rng.u64(..80)));
        while_pinning += u32::from(!broker.log().contains("guest memory is pinned"));
        if round % 2 == 0 {
            kill_process(pid(number)?, Signal::KILL)?;
            let status = broker.wait()?;
            ensure!(status.code() == Some(1), "{status}");
            broker.wait_for_log("the process that makes the guests' rings has ended")?;
        } else {
            broker.kill()?;
            await_end(number)?;
        }
        drop((queue, disk));
        let mut next = rig.broker(&["--mode", "direct", "--num-queues", "2"]).context("the next server")?;
        let status = next.terminate()?;
        ensure!(status.success(), "the next server: {status}");
    }
    eprintln!("{while_pinning} of the kills came while the memory was being pinned");
    ensure!(while_pinning > 0, "no kill came while the memory was being pinned");
    Ok(())
}
