//! The vhost-user-blk device with our own front-end: every kind of request, and every feature of the vrings.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::{
        blk::{BlkDriver, SECTOR_BYTES, range},
        load::LoadOptions,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options, bit},
    },
    harness::{self, Test, test},
    needs::Need,
    page_cache::unstable_pages,
    seed::Seed,
};
use tempfile::TempDir;
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_OK,
        VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES,
    },
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

const DISK_BYTES: u64 = 16 << 20;

fn main() -> ExitCode {
    let needs = |kind: DiskKind| kind.needs().into_iter().chain(broker_process::needs()).collect::<Vec<Need>>();
    let mut tests: Vec<Test> = DiskKind::ALL
        .map(|kind| {
            test(format!("the_device_executes_every_kind_of_request_on_{kind}"), needs(kind), move || {
                every_request(kind)
            })
        })
        .into();
    for (name, features) in [
        ("a_driver_reads_back_what_it_wrote_with_event_indexes_and_indirect_tables", 0),
        ("a_driver_reads_back_what_it_wrote_without_event_indexes", bit(VIRTIO_RING_F_EVENT_IDX)),
        ("a_driver_reads_back_what_it_wrote_without_indirect_tables", bit(VIRTIO_RING_F_INDIRECT_DESC)),
        ("a_legacy_driver_reads_back_what_it_wrote", bit(VIRTIO_F_VERSION_1)),
    ] {
        let run = move || load(Options::default().without(features), DiskKind::Ext4Direct);
        tests.push(test(name, needs(DiskKind::Ext4Direct), run));
    }
    tests.push(test(
        "flushed_and_written_through_data_is_on_the_disk",
        needs(DiskKind::Ext4PageCache).into_iter().chain([Need::cachestat()]),
        stability,
    ));
    tests.push(test(
        "the_device_does_not_execute_requests_whose_features_were_not_negotiated",
        needs(DiskKind::Ext4PageCache),
        not_negotiated,
    ));
    let squashfs_needs = [Need::program("mksquashfs", "squashfs-tools"), Need::program("mount", "mount"), squashfs()];
    tests.push(test(
        "a_flush_of_a_disk_on_squashfs_succeeds",
        needs(DiskKind::Loop).into_iter().chain(squashfs_needs),
        flush_on_squashfs,
    ));
    harness::run(tests)
}

fn squashfs() -> Need {
    Need::new("squashfs", || {
        let known = fs::read_to_string("/proc/filesystems")?;
        ensure!(known.contains("\tsquashfs\n"), "the kernel has no squashfs: `modprobe squashfs`");
        Ok(())
    })
}

fn every_request(kind: DiskKind) -> Result<()> {
    let rig = Rig::new(kind, DISK_BYTES)?;
    let broker = rig.broker(&["--serial", "a-serial-of-20-bytes"])?;
    broker.explain(every_request_of(&rig))
}

fn every_request_of(rig: &Rig) -> Result<()> {
    let mut ram = TestRam::new(2, 4 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let capacity = u64::from_le_bytes(front_end.connection().config(8)?.try_into().expect("eight bytes"));
    ensure!(capacity == DISK_BYTES / SECTOR_BYTES, "capacity {capacity}");
    let mut driver = ram.driver(&front_end, 0, 1 << 20)?;

    let id = driver.id()?;
    ensure!(id == b"a-serial-of-20-bytes", "the id is {:?}", String::from_utf8_lossy(&id));
    let pattern: Vec<u8> = (0..1u32 << 20).map(|index| (index * 7 / 5) as u8).collect();
    let sectors = pattern.len() as u32 / SECTOR_BYTES as u32;
    driver.write(64, &pattern)?;
    driver.flush()?;
    ensure!(driver.read(64, pattern.len() as u32)? == pattern, "the read returned other data");
    for unmap in [false, true] {
        driver.write_zeroes(64, sectors / 2, unmap)?;
        let found = driver.read(64, pattern.len() as u32)?;
        let (zeroes, rest) = found.split_at(pattern.len() / 2);
        ensure!(zeroes.iter().all(|&byte| byte == 0), "not zeroes after write zeroes with unmap {unmap}");
        ensure!(*rest == pattern[pattern.len() / 2..], "write zeroes with unmap {unmap} reached too far");
        driver.write(64, &pattern)?;
    }
    driver.discard(64, sectors / 2)?;
    let found = driver.read(64, pattern.len() as u32)?;
    ensure!(found[pattern.len() / 2..] == pattern[pattern.len() / 2..], "discard reached too far");
    let last = DISK_BYTES / SECTOR_BYTES - 8;
    driver.write(last, &pattern[..4096])?;
    ensure!(driver.read(last, 4096)? == pattern[..4096], "the last blocks read back other data");
    ensure!(front_end.stop_vring(0)? == driver.vring().next_avail(), "another base");
    Ok(())
}

fn not_negotiated() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&[])?;
    broker.explain(not_negotiated_of(&rig))
}

fn not_negotiated_of(rig: &Rig) -> Result<()> {
    let mut ram = TestRam::new(1, 4 << 20)?;
    let data = [0x5a; 4096];
    for (without, statuses) in [
        (bit(VIRTIO_BLK_F_DISCARD), [VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_S_OK]),
        (bit(VIRTIO_BLK_F_WRITE_ZEROES), [VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP]),
        (bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES), [VIRTIO_BLK_S_UNSUPP; 2]),
        (0, [VIRTIO_BLK_S_OK; 2]),
    ] {
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default().without(without))?;
        let mut driver = ram.driver(&front_end, 0, 4096)?;
        for (kind, status) in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES].into_iter().zip(statuses) {
            driver.write(0, &data)?;
            let buffer = driver.put_data(&range(0, 8, 0))?;
            let answer = driver.request(kind, 0, &[buffer])?;
            ensure!(u32::from(answer.status) == status, "type {kind} without {without:#x}: {answer:?}");
            let is_same = driver.read(0, 4096)? == data;
            // The content of a discarded range is undefined.
            ensure!(is_same || status == VIRTIO_BLK_S_OK, "type {kind} without {without:#x} was executed");
        }
        // The device flushes whatever was negotiated.
        driver.flush()?;
        front_end.stop_vring(0)?;
    }
    Ok(())
}

/// A mount point. The drop unmounts it lazily: the kernel closes the disk of a killed broker a moment later.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg("--lazy").arg(&self.0)) {
            eprintln!("{error:#}");
        }
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// squashfs has no fsync(2).
fn flush_on_squashfs() -> Result<()> {
    let directory = TempDir::with_prefix("ringpass-squashfs-")?;
    let [source, packed, mount_point] = ["source", "packed", "mounted"].map(|name| directory.path().join(name));
    fs::create_dir(&source)?;
    fs::create_dir(&mount_point)?;
    let pattern: Vec<u8> = (0..1 << 20).map(|index: u32| (index * 7 / 5) as u8).collect();
    fs::write(source.join("disk.img"), &pattern)?;
    run(Command::new("mksquashfs").args([&source, &packed]).args(["-quiet", "-no-progress"]))?;
    run(Command::new("mount").args(["-t", "squashfs", "-o", "loop,ro"]).args([&packed, &mount_point]))?;
    let mounted = Mounted(mount_point);
    let disk = mounted.0.join("disk.img");
    let refused = File::open(&disk)?.sync_data().err().context("this squashfs has fsync, so the test shows nothing")?;
    eprintln!("fdatasync: {refused}");
    let socket = directory.path().join("vhost.sock");
    let broker = BrokerProcess::start(&socket, &disk, &["--read-only"])?;
    broker.explain(flush_of(&socket, &pattern))
}

fn flush_of(socket: &Path, pattern: &[u8]) -> Result<()> {
    let mut ram = TestRam::new(1, 4 << 20)?;
    let front_end = FrontEnd::connect(socket, &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    ensure!(driver.read(8, 4096)? == pattern[4096..8192], "the read returned other data");
    driver.flush()
}

fn stability() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&[])?;
    broker.explain(stability_of(&rig))
}

fn stability_of(rig: &Rig) -> Result<()> {
    /// The offset of `writeback` in the configuration space (VIRTIO 1.2, 5.2.4).
    const WRITEBACK: u32 = 32;
    let disk = rig.disk_file()?;
    disk.sync_all()?;
    let mut ram = TestRam::new(1, 4 << 20)?;
    {
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        let mut driver = ram.driver(&front_end, 0, 1 << 20)?;
        let data = vec![1; 1 << 20];
        // The kernel writes dirty pages out at any time, so one page that stays dirty for a moment is enough.
        let leaves_dirty_pages = |driver: &mut BlkDriver| -> Result<bool> {
            for _ in 0..100 {
                driver.write(64, &data)?;
                if unstable_pages(&disk)? > 0 {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        ensure!(leaves_dirty_pages(&mut driver)?, "each write is stable at once");
        driver.flush()?;
        ensure!(unstable_pages(&disk)? == 0, "pages are dirty after a flush");

        front_end.connection().set_config(WRITEBACK, &[0])?;
        check_write_through(&mut driver, &disk)?;
        front_end.connection().set_config(WRITEBACK, &[1])?;
        ensure!(leaves_dirty_pages(&mut driver)?, "the cache stays off");
        driver.flush()?;
        front_end.stop_vring(0)?;
    }
    let no_flush = Options::default().without(bit(VIRTIO_BLK_F_FLUSH) | bit(VIRTIO_BLK_F_CONFIG_WCE));
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, no_flush)?;
    check_write_through(&mut ram.driver(&front_end, 0, 1 << 20)?, &disk).context("for a driver that cannot flush")
}

fn check_write_through(driver: &mut BlkDriver, disk: &File) -> Result<()> {
    for round in 0..20u8 {
        for bytes in [512, 4096, 1 << 20] {
            driver.write(64 + u64::from(round), &vec![round; bytes])?;
            let pages = unstable_pages(disk)?;
            ensure!(pages == 0, "{pages} pages are dirty after a write of {bytes} bytes with write-through");
        }
    }
    Ok(())
}

fn load(options: Options, kind: DiskKind) -> Result<()> {
    let rig = Rig::new(kind, DISK_BYTES)?;
    let broker = rig.broker(&[])?;
    broker.explain(load_of(&rig, options))
}

fn load_of(rig: &Rig, options: Options) -> Result<()> {
    let mut ram = TestRam::new(3, 8 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, options)?;
    let load = LoadOptions {
        indirect: front_end.has_indirect(),
        unaligned: true,
        flush_percent: 2,
        write_zeroes_percent: 5,
        ..LoadOptions::new(0, DISK_BYTES / 4096, 32, Seed::from_env_or_random())
    };
    let mut load = ram.load(&front_end, 0, 128, load)?;
    load.run(harness::budget(5_000, 200_000))?;
    let base = front_end.stop_vring(0)?;
    ensure!(base == load.vring().next_avail(), "base {base}");
    load.check_disk(&rig.disk_file()?)
}
