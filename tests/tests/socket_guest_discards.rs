//! A virtual machine discards memory that the broker has pinned for rings.
//!
//! QEMU discards the memory at the request of a Linux guest. The rings belong to a process on the same broker. It
//! offers the RAM of the virtual machine besides its own, as the front-end of that machine would, so the broker pins it
//! in the same way.

use std::{
    fs::File,
    os::fd::AsRawFd,
    path::PathBuf,
    process::{self, Command, ExitCode},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use ringpass_guest::vhost_user::{Disk, ExecutedBy, Way};
use ringpass_guest_abi::request::ErrorCode;
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    content::check_content,
    disks::DiskKind,
    front_end::rig::Rig,
    harness::{self, Test, test},
    linux_guest::{self, LinuxGuest, LinuxGuestConfig},
    needs::Need,
    seed::Seed,
    socket_guest::{Load, LoadedQueue, connect, options},
};
use ringpass_workload::Wait;
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use serde_json::json;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;
/// The RAM of the process that drives the rings.
const OWN_BYTES: u64 = 8 * MIB;
/// The RAM of the virtual machine.
const VM_MIB: u64 = 256;
/// How much RAM the inflated balloon leaves.
const INFLATED_MIB: u64 = 192;
/// The memory that can be plugged into the virtual machine, and how much of it is plugged.
const PLUGGABLE_MIB: u64 = 256;
const PLUGGED_MIB: u64 = 128;
/// The address at which the process offers the machine's RAM: any address above its own memory.
const VM_GPA: u64 = 4 << 30;
/// The most time from the first discard to the error in the log. The broker looks twenty times a second.
const NOTICED_WITHIN: Duration = Duration::from_secs(1);
/// The most time from the first discard to the end of the last pin.
const UNPINNED_WITHIN: Duration = Duration::from_secs(5);
/// The most pinned memory that belongs to no guest.
const OTHER_PINNED_BYTES: u64 = MIB;
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let with = |name: &str, body: fn() -> Result<()>| -> Test {
        let needs = [linux_guest::needs(), broker_process::needs(), DiskKind::Ext4PageCache.needs()];
        let others = [Need::cpus(2), Need::available_memory_bytes(1 << 30)];
        test(name, needs.into_iter().flatten().chain(others), body)
    };
    harness::run(vec![
        with("a_balloon_ends_direct_mode_until_the_device_is_reset", balloon),
        with("free_page_reporting_ends_direct_mode_until_the_device_is_reset", free_page_reporting),
        with("virtio_mem_ends_direct_mode_until_the_device_is_reset", virtio_mem),
    ])
}

/// The memory of a virtual machine, in a file.
struct VmMemory {
    file: File,
    len_bytes: u64,
}

impl VmMemory {
    fn new(len_bytes: u64) -> Result<Self> {
        let file = File::from(memfd_create("vm-ram", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, len_bytes)?;
        Ok(Self { file, len_bytes })
    }

    /// A path of the file, which QEMU opens.
    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", process::id(), self.file.as_raw_fd()).into()
    }

    /// How much of the memory is allocated.
    fn present_bytes(&self) -> Result<u64> {
        Ok(u64::try_from(fstat(&self.file)?.st_blocks)? * 512)
    }
}

/// A broker, and the memory of a virtual machine that a process offers to it.
struct Scene {
    rig: Rig,
    broker: BrokerProcess,
    memory: VmMemory,
}

impl Scene {
    fn new(memory_bytes: u64) -> Result<Self> {
        let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
        let broker = rig.broker(&["--mode", "direct", "--num-queues", "3"])?;
        Ok(Self { rig, broker, memory: VmMemory::new(memory_bytes)? })
    }

    /// Connects the driver of the rings, offers the memory of the virtual machine, and opens a queue with a ring.
    fn connect(&self, seed: Seed) -> Result<(Disk, LoadedQueue)> {
        let disk = connect(&self.rig.socket(), options(2, OWN_BYTES, Way::Ring))?;
        disk.add_foreign_memory(VM_GPA, self.memory.file.try_clone()?, self.memory.len_bytes)?;
        let load = Load { depth: 8, block_bytes: 4096, blocks: 256, wait: Wait::Interrupt };
        let mut queue = LoadedQueue::new(&disk, 1, load, seed)?;
        queue.fill()?;
        let pinned_bytes = self.broker.usage()?.pinned_bytes;
        let all_bytes = self.memory.len_bytes + OWN_BYTES;
        ensure!(pinned_bytes >= all_bytes, "{pinned_bytes} bytes are pinned, the guest's memory has {all_bytes}");
        Ok((disk, queue))
    }

    fn has_noticed(&self) -> bool {
        self.broker.has_logged("guest memory was discarded while rings had it pinned")
    }

    /// What `ringpass dev show` prints.
    fn shown(&self) -> Result<String> {
        let output = Command::new(broker_process::program()?)
            .args(["dev", "show", "vhost"])
            .env("RUNTIME_DIRECTORY", self.rig.directory())
            .output()
            .context("cannot run ringpass dev show")?;
        ensure!(output.status.success(), "ringpass dev show: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Starts the discard, and waits for it, for the error, and for the end of the pins.
    fn await_end_of_direct_mode(
        &self,
        guest: &mut LinuxGuest,
        discard: impl FnOnce(&mut LinuxGuest) -> Result<()>,
    ) -> Result<()> {
        let (full_bytes, start) = (self.memory.present_bytes()?, Instant::now());
        discard(guest)?;
        let mut discarded = None;
        while !self.has_noticed() {
            if discarded.is_none() && self.memory.present_bytes()? < full_bytes {
                discarded = Some(Instant::now());
            }
            ensure!(start.elapsed() < LIMIT, "no error about discarded memory (seen here: {discarded:?})");
            guest.let_run(Duration::from_millis(1))?;
        }
        // The broker may have noticed the discard before this test.
        let discarded = discarded.unwrap_or_else(Instant::now);
        let noticed = discarded.elapsed();
        let unpinned = loop {
            let pinned_bytes = self.broker.usage()?.pinned_bytes;
            if pinned_bytes < OTHER_PINNED_BYTES {
                break discarded.elapsed();
            }
            ensure!(discarded.elapsed() < UNPINNED_WITHIN, "{pinned_bytes} bytes are still pinned");
            thread::sleep(Duration::from_millis(1));
        };
        eprintln!("after the discard: the error after {noticed:?}, the last pin gone after {unpinned:?}");
        ensure!(noticed < NOTICED_WITHIN, "the discard was noticed after {noticed:?}");
        ensure!(self.broker.has_logged("data that the guest wrote or read through a ring since then may be wrong"));
        ensure!(self.broker.has_logged("A balloon, free page reporting, virtio-mem and postcopy do this"));
        Ok(())
    }
}

/// Runs `work` while `queue` reads and writes, and then verifies everything that was written.
fn under_load<T>(queue: &mut LoadedQueue, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| -> Result<u64> {
            let mut verified_bytes = 0;
            while !is_over.load(Ordering::Relaxed) {
                verified_bytes += queue.run(50_000_000, 0)?.verified_bytes;
            }
            queue.verify()?;
            Ok(verified_bytes)
        });
        let result = work();
        is_over.store(true, Ordering::Relaxed);
        let verified_bytes = load.join().map_err(|_| anyhow!("the driver panicked"))??;
        ensure!(verified_bytes > 0, "the load verified nothing");
        result
    })
}

fn is_first_ring(queue: &LoadedQueue) -> bool {
    queue.queue.executed_by() == ExecutedBy::Ring { epoch: 1 }
}

/// The test for every kind of discard: `discard` starts it, and `give_back` ends it.
fn ends_direct_mode(
    scene: &Scene,
    guest: &mut LinuxGuest,
    (disk, mut queue): (Disk, LoadedQueue),
    discard: impl FnOnce(&mut LinuxGuest) -> Result<()>,
    give_back: impl FnOnce(&mut LinuxGuest) -> Result<()>,
) -> Result<()> {
    under_load(&mut queue, || {
        guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null && md5sum /tmp/data && rm /tmp/data")?;
        guest.let_run(Duration::from_secs(1))
    })?;
    ensure!(is_first_ring(&queue) && !scene.has_noticed(), "a guest that discards nothing ended direct mode");
    let shown = scene.shown()?;
    ensure!(shown.contains("queue 1: ring epoch 1 open") && !shown.contains("no rings at present"), "{shown}");

    under_load(&mut queue, || {
        scene.await_end_of_direct_mode(guest, discard)?;
        // The driver asks for a ring on the other queue, and the device refuses.
        let refusal = disk.queue(2).err().context("a ring after the discard")?.to_string();
        ensure!(refusal.contains("(Discarded)"), "{refusal}");
        let start = Instant::now();
        let shown = loop {
            let shown = scene.shown()?;
            if shown.contains("queue 1: virtqueue") {
                break shown;
            }
            // The status shows the end of the ring a little after the pins have ended.
            ensure!(start.elapsed() < UNPINNED_WITHIN, "queue 1 is not a virtqueue: {shown}");
        };
        let why = "no rings at present: guest memory was discarded while it was pinned (balloon, free page reporting, \
                   virtio-mem or postcopy); no rings before the driver resets the device";
        ensure!(shown.contains(why), "{shown}");
        Ok(())
    })?;
    let expected = ExecutedBy::Virtqueue { refused: Some(ErrorCode::Discarded) };
    ensure!(queue.queue.executed_by() == expected, "{:?}", queue.queue.executed_by());
    check_content(&scene.rig.disk_file()?, &queue.job, queue.expected())?;
    drop((queue, disk));

    give_back(guest)?;
    let (disk, mut queue) = scene.connect(Seed::from_env_or_random()).context("after the reset")?;
    under_load(&mut queue, || guest.let_run(Duration::from_secs(1)))?;
    ensure!(is_first_ring(&queue), "direct mode did not come back: {:?}", queue.queue.executed_by());
    drop((queue, disk));
    Ok(())
}

fn vm(memory: &VmMemory, balloon: &str) -> LinuxGuestConfig {
    LinuxGuestConfig {
        memory_mib: VM_MIB as u32,
        memory_file: Some(memory.path()),
        devices: vec![format!("virtio-balloon-pci,id=balloon{balloon}")],
        ..LinuxGuestConfig::default()
    }
}

fn balloon() -> Result<()> {
    let scene = Scene::new(VM_MIB * MIB)?;
    scene.broker.explain((|| {
        // The broker pins the memory before the machine boots: neither firmware nor kernel may look like a discard.
        let driver = scene.connect(Seed::from_env_or_random())?;
        let mut guest = LinuxGuest::boot(&vm(&scene.memory, ""))?;
        guest.run("load-module virtio_balloon")?;
        let inflate = |guest: &mut LinuxGuest| set_balloon(guest, INFLATED_MIB);
        let deflate = |guest: &mut LinuxGuest| await_balloon(guest, VM_MIB);
        ends_direct_mode(&scene, &mut guest, driver, inflate, deflate)?;
        guest.shut_down()
    })())
}

fn set_balloon(guest: &mut LinuxGuest, mib: u64) -> Result<()> {
    guest.qmp(json!({"execute": "balloon", "arguments": {"value": mib * MIB}})).map(drop)
}

fn await_balloon(guest: &mut LinuxGuest, mib: u64) -> Result<()> {
    set_balloon(guest, mib)?;
    let start = Instant::now();
    while guest.qmp(json!({"execute": "query-balloon"}))?["actual"] != mib * MIB {
        ensure!(start.elapsed() < LIMIT, "the guest does not follow its balloon");
        guest.let_run(Duration::from_millis(10))?;
    }
    Ok(())
}

fn free_page_reporting() -> Result<()> {
    let scene = Scene::new(VM_MIB * MIB)?;
    scene.broker.explain((|| {
        let driver = scene.connect(Seed::from_env_or_random())?;
        let mut guest = LinuxGuest::boot(&vm(&scene.memory, ",free-page-reporting=on"))?;
        let begin = |guest: &mut LinuxGuest| guest.spawn("load-module virtio_balloon").map(drop);
        let end = |guest: &mut LinuxGuest| guest.run("rmmod virtio_balloon").map(drop);
        ends_direct_mode(&scene, &mut guest, driver, begin, end)?;
        guest.shut_down()
    })())
}

fn virtio_mem() -> Result<()> {
    let scene = Scene::new(PLUGGABLE_MIB * MIB)?;
    scene.broker.explain((|| {
        let path = scene.memory.path();
        let config = LinuxGuestConfig {
            memory_mib: VM_MIB as u32,
            memory_max_mib: Some((VM_MIB + PLUGGABLE_MIB) as u32),
            objects: vec![format!(
                "memory-backend-file,id=pluggable,size={PLUGGABLE_MIB}M,mem-path={},share=on",
                path.display()
            )],
            devices: vec!["virtio-mem-pci,id=plugged,memdev=pluggable".to_owned()],
            ..LinuxGuestConfig::default()
        };
        let mut guest = LinuxGuest::boot(&config)?;
        guest.run("load-module virtio_mem")?;
        await_plugged(&mut guest, PLUGGED_MIB)?;
        // QEMU offers the whole region to its back-ends, so the broker also pins the part that is not plugged.
        let driver = scene.connect(Seed::from_env_or_random())?;
        let unplug = |guest: &mut LinuxGuest| request_plugged(guest, 0);
        let plug = |guest: &mut LinuxGuest| await_plugged(guest, PLUGGED_MIB);
        ends_direct_mode(&scene, &mut guest, driver, unplug, plug)?;
        guest.shut_down()
    })())
}

fn request_plugged(guest: &mut LinuxGuest, mib: u64) -> Result<()> {
    let property = json!({"path": "/machine/peripheral/plugged", "property": "requested-size", "value": mib * MIB});
    guest.qmp(json!({"execute": "qom-set", "arguments": property})).map(drop)
}

fn await_plugged(guest: &mut LinuxGuest, mib: u64) -> Result<()> {
    request_plugged(guest, mib)?;
    let property = json!({"path": "/machine/peripheral/plugged", "property": "size"});
    let start = Instant::now();
    while guest.qmp(json!({"execute": "qom-get", "arguments": property}))? != mib * MIB {
        ensure!(start.elapsed() < LIMIT, "the guest does not plug the requested memory");
        guest.let_run(Duration::from_millis(10))?;
    }
    Ok(())
}
