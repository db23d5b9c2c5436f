//! The repository's driver on devices that give no rings: a disk of another vhost-user server, and a disk behind an IOMMU.
//! Each is an ordinary disk for it, and the log says why.

use std::{
    fs::File,
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::harness::{self, test};
use ringpass_tests::linux_guest::{
    self, BlockDriver, LinuxGuest, LinuxGuestConfig, VhostUserDisk, fio, on_rings::Ways,
};
use ringpass_tests::needs::{Need, find_program};

const SERVER: &str = "qemu-storage-daemon";
const DISK_BYTES: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let needs = || {
        let server = Need::program(SERVER, "qemu-system-common");
        linux_guest::needs().into_iter().chain([server]).collect::<Vec<Need>>()
    };
    harness::run(vec![test(
        "disks_of_other_servers_and_behind_an_iommu_are_ordinary_for_the_driver",
        needs(),
        ordinary_disks,
    )])
}

/// A qemu-storage-daemon that serves a disk. The drop kills it.
struct Server {
    child: Child,
}

impl Server {
    fn start(disk: &Path, socket: &Path) -> Result<Self> {
        let mut command = Command::new(find_program(SERVER).context("there is no program")?);
        let export = format!(
            "vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
            socket.display()
        );
        command
            .args(["--blockdev", &format!("file,node-name=disk,discard=unmap,filename={}", disk.display())])
            .args(["--export", &export])
            .stdin(Stdio::null());
        let child = command.spawn().with_context(|| format!("cannot start {SERVER}"))?;
        let mut server = Self { child };
        let end = Instant::now() + LIMIT;
        while !socket.exists() {
            let ended = server.child.try_wait()?;
            ensure!(ended.is_none() && Instant::now() < end, "{SERVER} does not serve: {ended:?}");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            eprintln!("{SERVER} cannot be ended: {error}");
        }
    }
}

fn ordinary_disks() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name);
    for name in ["served", "own"] {
        File::create(path(name))?.set_len(DISK_BYTES)?;
    }
    let socket = path("socket");
    let _server = Server::start(&path("served"), &socket)?;
    let config = LinuxGuestConfig::default();
    let mut guest = LinuxGuest::boot(&LinuxGuestConfig {
        block_driver: Some(BlockDriver::of(config.kernel)?),
        disks: vec![VhostUserDisk::new("served", &socket)],
        block_nodes: vec![format!("file,node-name=own,filename={},discard=unmap", path("own").display())],
        devices: vec![
            "intel-iommu".to_owned(),
            "virtio-blk-pci,drive=own,num-queues=2,iommu_platform=on,disable-legacy=on".to_owned(),
        ],
        kernel_arguments: vec!["intel_iommu=on".to_owned()],
        ..config
    })?;
    let log = guest.run("dmesg | grep -e ringpass_blk -e DMAR")?;
    // The kernel finds a device on the root bus before those behind ports.
    for (disk, reason) in [("vda", "its memory is behind an IOMMU"), ("vdb", "it is not a ringpass device")] {
        let line = format!("[{disk}] an ordinary disk: {reason}");
        ensure!(log.contains(&line), "no {line:?}:\n{log}");
    }
    // The IOMMU translates what the first disk reads and writes.
    let groups = guest.run("ls /sys/kernel/iommu_groups | wc -l")?;
    ensure!(groups.trim() != "0", "the guest uses no IOMMU:\n{log}");
    for disk in ["vda", "vdb"] {
        use_disk(&mut guest, disk).with_context(|| disk.to_owned())?;
    }
    guest.shut_down()
}

fn use_disk(guest: &mut LinuxGuest, disk: &str) -> Result<()> {
    let device = format!("/dev/{disk}");
    let ways = Ways::during(guest, disk, |guest| {
        guest.run(&fio::verify(
            "libaio",
            &device,
            "--rw=randrw --bsrange=4k-256k --size=8m --iodepth=16 --fsync=32",
        ))?;
        guest.run(&fio::verify("io_uring", &device, "--rw=randwrite --bs=4k --size=4m --iodepth=32"))?;
        guest
            .run(&format!(
                "set -e
                mkfs.ext4 -q {device}
                mount {device} /mnt
                dd if=/dev/urandom of=/mnt/a bs=1M count=4 conv=fsync 2>/dev/null
                cp /mnt/a /mnt/b
                umount /mnt
                mount {device} /mnt
                cmp /mnt/a /mnt/b
                umount /mnt
                e2fsck -fn {device}
                blkdiscard -f {device}"
            ))
            .map(drop)
    })?;
    ensure!(ways.ring == 0 && ways.virtqueue > 1000, "{ways:?}");
    Ok(())
}
