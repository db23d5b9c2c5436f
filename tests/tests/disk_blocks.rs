//! The block sizes that a guest sees, and its requests that are smaller than direct I/O takes.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_broker::disk::{DirectAlignment, Disk, DiskConfig};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    front_end::{
        blk::{BlkDriver, SECTOR_BYTES},
        rig::TestRam,
        session::{FrontEnd, Options},
    },
    harness::{self, Test, test},
    mounts::{FileSystem, Mounted, run},
    seed::Seed,
};
use rustix::process::Signal;
use tempfile::TempDir;
use vhost::vhost_user::message::BackendReq;

const DISK_BYTES: u64 = 4 << 20;
const MOST_BYTES: u32 = 64 << 10;

fn main() -> ExitCode {
    let needs =
        |file_system: FileSystem| file_system.needs().into_iter().chain(broker_process::needs()).collect::<Vec<_>>();
    let mut tests = vec![
        test("a_reflinked_copy_of_an_image_has_the_same_block_size", needs(FileSystem::Xfs), reflink),
        test("a_disk_finer_than_direct_io_offers_no_rings_and_says_why", needs(FileSystem::Ext4), no_rings),
    ];
    tests.extend([FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs].map(|file_system| -> Test {
        let name = format!("queues_write_neighbouring_sectors_smaller_than_direct_io_takes_on_{file_system}");
        test(name, needs(file_system), move || side_by_side(file_system))
    }));
    harness::run(tests)
}

/// A server for one image, and a place for its socket.
struct Place {
    directory: TempDir,
    image: PathBuf,
}

impl Place {
    fn new(image: &Path) -> Result<Self> {
        Ok(Self { directory: TempDir::with_prefix("ringpass-blocks-")?, image: image.to_owned() })
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("vhost.sock")
    }

    fn broker(&self, arguments: &[&str]) -> Result<BrokerProcess> {
        let arguments = [&["--direct-io", "on", "--lock-wait-s", "60"], arguments].concat();
        BrokerProcess::start(&self.socket(), &self.image, &arguments)
    }

    fn front_end(&self, ram: &TestRam) -> Result<FrontEnd> {
        FrontEnd::connect(&self.socket(), &ram.ram, Options::default())
    }

    /// The output of `ringpass dev show` for the server.
    fn shown(&self) -> Result<String> {
        let mut show = Command::new(broker_process::program()?);
        let output = show.args(["dev", "show", "vhost"]).env("RUNTIME_DIRECTORY", self.directory.path()).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }
}

/// `blk_size` and the bytes of a physical block, from the configuration space (VIRTIO 1.2, 5.2.4).
fn told_blocks(front_end: &FrontEnd) -> Result<(u32, u32)> {
    let config = front_end.connection().config(60)?;
    let block_bytes = u32::from_le_bytes(config[20..24].try_into()?);
    Ok((block_bytes, block_bytes << config[24]))
}

fn direct_alignment(image: &Path) -> Result<DirectAlignment> {
    Disk::locate(&DiskConfig::new(image))?.direct_alignment().context("the file has direct I/O")
}

/// Checks some sectors and writes one, as a guest that knows sectors of 512 bytes.
fn check_sectors(place: &Place, expected: &[(u64, u8)], written: (u64, u8)) -> Result<()> {
    let mut ram = TestRam::new(1, 4 << 20)?;
    let front_end = place.front_end(&ram)?;
    let blocks = told_blocks(&front_end)?;
    ensure!(blocks == (512, 4096), "the guest sees blocks of {blocks:?}");
    let mut driver = ram.driver(&front_end, 0, MOST_BYTES)?;
    for &(sector, byte) in expected {
        ensure!(driver.read(sector, 512)? == [byte; 512], "sector {sector} is not {byte:#x}");
    }
    driver.write(written.0, &[written.1; 512])?;
    ensure!(driver.read(written.0, 512)? == [written.1; 512]);
    driver.flush()?;
    front_end.stop_vring(0)?;
    Ok(())
}

fn reflink() -> Result<()> {
    let mounted = Mounted::new(FileSystem::Xfs, 512)?;
    let image = mounted.image("image", DISK_BYTES)?;
    let (place, clone) = (Place::new(&image)?, mounted.path().join("clone"));
    {
        let broker = place.broker(&[])?;
        broker.explain(check_sectors(&place, &[], (1, 0xa1)))?;
        run("cp", ["--reflink=always".as_ref(), image.as_os_str(), clone.as_os_str()])?;
        // From now on the image shares its extents too, while the server runs.
        broker.explain(check_sectors(&place, &[(1, 0xa1)], (3, 0xa3)))?;
        ensure!(!broker.has_logged("takes direct I/O in units"), "{}", broker.log());
    }
    for (image, has_third) in [(image, true), (clone, false)] {
        let alignment = direct_alignment(&image)?;
        ensure!(alignment.write_block_bytes == 4096 && alignment.read_block_bytes == 512, "{alignment:?}");
        let place = Place::new(&image)?;
        let mut expected = vec![(1, 0xa1), (3, if has_third { 0xa3 } else { 0 }), (0, 0)];
        for (round, arguments) in [&[][..], &[], &["--logical-block-size", "512"]].into_iter().enumerate() {
            let mut broker = place.broker(arguments)?;
            let written = (5 + round as u64, 0xb0 + round as u8);
            broker.explain(check_sectors(&place, &expected, written))?;
            expected.push(written);
            let warned =
                "the guest has blocks of 512 bytes, and the file system takes direct I/O in units of 4096 bytes";
            broker.wait_for_log(warned)?;
            ensure!(broker.has_logged("cp --reflink=never"), "{}", broker.log());
            broker.kill()?;
        }
    }
    Ok(())
}

fn no_rings() -> Result<()> {
    let mounted = Mounted::new(FileSystem::Ext4, 4096)?;
    let image = mounted.image("image", DISK_BYTES)?;
    let place = Place::new(&image)?;
    let why = ["the guest has blocks of 512 bytes, and direct I/O on ", "takes 4096", "--logical-block-size 4096"];
    {
        let broker = place.broker(&["--mode", "auto"])?;
        broker.wait_for_log("guests get virtqueues only: ")?;
        let shown = place.shown()?;
        for part in why {
            ensure!(broker.has_logged(part), "{part:?} is not in {}", broker.log());
            ensure!(shown.contains(part), "{part:?} is not in {shown}");
        }
    }
    match place.broker(&["--mode", "direct"]) {
        Ok(broker) => bail!("a server with rings has started:\n{}", broker.log()),
        Err(error) => ensure!(why.iter().all(|part| format!("{error:#}").contains(part)), "{error:#}"),
    }
    // The device offers rings if the guest's blocks are large enough, or if direct I/O is off.
    for arguments in [["--logical-block-size", "4096"], ["--direct-io", "off"]] {
        let arguments = [&["--mode", "auto", "--lock-wait-s", "60"], &arguments[..]].concat();
        let broker = BrokerProcess::start(&place.socket(), &image, &arguments)?;
        broker.wait_for_log("waiting for a front-end")?;
        ensure!(!broker.has_logged("the guest has blocks of"), "{}", broker.log());
    }
    Ok(())
}

fn side_by_side(file_system: FileSystem) -> Result<()> {
    let mounted = Mounted::new(file_system, 4096)?;
    let size_bytes = DISK_BYTES + 3 * SECTOR_BYTES;
    let image = mounted.image("image", size_bytes)?;
    let alignment = direct_alignment(&image)?;
    ensure!(alignment.write_block_bytes == 4096, "{alignment:?}");
    let place = Place::new(&image)?;
    let mut broker = place.broker(&["--logical-block-size", "512", "--num-queues", "4", "--poll-us", "0"])?;
    let mut ram = TestRam::new(1, 4 << 20)?;
    let front_end = place.front_end(&ram)?;
    broker.explain(write_side_by_side(&place, &mut ram, &front_end, size_bytes))?;

    // The image grows by a sector, so the partial block at its end changes.
    let size_bytes = size_bytes + SECTOR_BYTES;
    File::options().write(true).open(&image)?.set_len(size_bytes)?;
    broker.signal(Signal::HUP)?;
    let channel = front_end.backend().context("BACKEND_REQ is not negotiated")?;
    let message = broker.explain(channel.receive())?.context("the broker closed its channel")?;
    ensure!(message.request == BackendReq::CONFIG_CHANGE_MSG as u32, "{message:?}");
    let mut driver = ram.driver(&front_end, 0, MOST_BYTES)?;
    let last = size_bytes / SECTOR_BYTES - 1;
    broker.explain(driver.write(last, &[0x5c; 512]))?;
    ensure!(broker.explain(driver.read(last, 512))? == [0x5c; 512]);
    ensure!(fs::metadata(&image)?.len() == size_bytes, "the image is longer than it was made");
    front_end.stop_vring(0)?;
    ensure!(broker.terminate()?.success());
    Ok(())
}

/// Queues write neighbouring sectors at the same time, each its own. Then the test reads the image itself.
fn write_side_by_side(place: &Place, ram: &mut TestRam, front_end: &FrontEnd, size_bytes: u64) -> Result<()> {
    const QUEUES: u16 = 4;
    let blocks = told_blocks(front_end)?;
    ensure!(blocks == (512, 4096), "the guest sees blocks of {blocks:?}");
    let drivers = (0..QUEUES).map(|index| ram.driver(front_end, index, MOST_BYTES)).collect::<Result<Vec<_>>>()?;
    let seed = Seed::from_env_or_random();
    // The first blocks, and the partial block at the end of the disk.
    let sectors: Vec<u64> = (0..32).chain(DISK_BYTES / SECTOR_BYTES - 5..size_bytes / SECTOR_BYTES).collect();
    let written = thread::scope(|scope| {
        let write = |(index, driver): (usize, BlkDriver)| {
            let own = sectors.iter().copied().filter(|sector| sector % u64::from(QUEUES) == index as u64);
            let own: Vec<u64> = own.collect();
            scope.spawn(move || write_sectors(driver, &own, seed.derive(index)))
        };
        let threads: Vec<_> = drivers.into_iter().enumerate().map(write).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Result<Vec<_>>>()
    })?;
    for index in 0..QUEUES {
        front_end.stop_vring(index)?;
    }
    let file = File::open(&place.image)?;
    let mut found = [0; 512];
    for (sector, byte) in written.into_iter().flatten() {
        file.read_exact_at(&mut found, sector * SECTOR_BYTES)?;
        ensure!(found == [byte; 512], "sector {sector} is not {byte:#x} but {:#x} ({seed})", found[0]);
    }
    ensure!(file.metadata()?.len() == size_bytes, "the image is longer than it was");
    Ok(())
}

/// Writes and reads its own sectors, one after the other. Returns the last byte of each.
fn write_sectors(mut driver: BlkDriver, own: &[u64], seed: Seed) -> Result<Vec<(u64, u8)>> {
    let mut rng = seed.rng();
    let mut now: Vec<(u64, u8)> = own.iter().map(|&sector| (sector, 0)).collect();
    for _ in 0..harness::budget(400, 20_000) {
        let (sector, byte) = &mut now[rng.usize(0..own.len())];
        ensure!(driver.read(*sector, 512)? == [*byte; 512], "sector {sector} is not {byte:#x}");
        *byte = rng.u8(1..);
        driver.write(*sector, &[*byte; 512])?;
    }
    driver.flush()?;
    Ok(now)
}
