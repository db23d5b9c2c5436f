//! The behaviour of a server towards front-ends, and what front-ends cost it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use ringpass_broker::disk::{Disk, DiskConfig};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::program::*;

/// Starts the first vring, as a front-end does when its guest runs. The vring runs until the returned eventfd is
/// dropped.
fn start_vring(front_end: &mut Frontend) -> EventFd {
    const RAM_BYTES: u64 = 1 << 20;
    const USER_ADDRESS: u64 = 1 << 32;
    let ram = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    ram.set_len(RAM_BYTES).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: RAM_BYTES,
        userspace_addr: USER_ADDRESS,
        mmap_offset: 0,
        mmap_handle: ram.as_raw_fd(),
    };
    let rings = VringConfigData {
        queue_max_size: 128,
        queue_size: 128,
        flags: 0,
        desc_table_addr: USER_ADDRESS,
        avail_ring_addr: USER_ADDRESS + 0x1000,
        used_ring_addr: USER_ADDRESS + 0x2000,
        log_addr: None,
    };
    let kick = EventFd::new(0).unwrap();
    front_end.set_mem_table(&[region]).unwrap();
    front_end.set_vring_num(0, rings.queue_size).unwrap();
    front_end.set_vring_base(0, 0).unwrap();
    front_end.set_vring_addr(0, &rings).unwrap();
    front_end.set_vring_kick(0, &kick).unwrap();
    kick
}

/// Fails if a process waits for the disk. Only time can show that no process takes it.
fn assert_no_process_waits(place: &Place) {
    for _ in 0..10 {
        Disk::open(&DiskConfig::new(place.path("disk.img"))).expect("no other process wants the disk");
        std::thread::sleep(Duration::from_millis(30));
    }
}

#[test]
fn a_migration_destination_locks_the_disk_when_its_guest_runs_and_the_source_has_released_it() {
    let place = Place::new();
    let source = || Disk::open(&DiskConfig::new(place.path("disk.img"))).unwrap();
    let disk = source();
    let mut running = Running::start(&mut place.serve(&["--socket-path", "s", "--incoming"]));
    running.wait_for("waiting for a front-end");
    let mut front_end = front_end(&place, VhostUserProtocolFeatures::CONFIG);
    assert_eq!(capacity_sectors(&mut front_end), (1 << 20) / 512);
    // The guest is reset while its memory is copied: the source releases the disk and takes it again.
    drop(disk);
    assert_no_process_waits(&place);
    let disk = source();
    let _vring = start_vring(&mut front_end);
    running.wait_for("waiting for the disk");
    drop(disk);
    running.wait_for("disk acquired");
    running.signal(Signal::TERM);
    assert_eq!(running.end().code(), Some(0));
}

#[test]
fn a_destination_without_a_front_end_leaves_the_disk_to_the_source() {
    let place = Place::new();
    let disk = Disk::open(&DiskConfig::new(place.path("disk.img"))).unwrap();
    let running = Running::start(&mut place.serve(&["--socket-path", "s", "--incoming"]));
    running.wait_for("waiting for a front-end");
    let mut front_end = front_end(&place, VhostUserProtocolFeatures::CONFIG);
    let _vring = start_vring(&mut front_end);
    running.wait_for("waiting for the disk");
    drop(front_end);
    running.wait_for("front-end disconnected");
    drop(disk);
    // An attempt that had begun before may still have the disk for a moment.
    Disk::open(&DiskConfig::new(place.path("disk.img")).lock_wait(LIMIT)).unwrap();
    assert_no_process_waits(&place);
}

/// The capacity in sectors, as a front-end reads it (VIRTIO 1.2, 5.2.4).
fn capacity_sectors(front_end: &mut Frontend) -> u64 {
    let (_, space) = front_end.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap();
    u64::from_le_bytes(space[..8].try_into().unwrap())
}

fn limit_bytes(running: &Running, name: &str) -> u64 {
    let limits = fs::read_to_string(format!("/proc/{}/limits", running.child.id())).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_ascii_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn after_sighup_the_new_size_of_an_image_is_its_limit() {
    let place = Place::new();
    let image = File::options().write(true).open(place.path("disk.img")).unwrap();
    let running = Running::start(&mut place.serve(&["--socket-path", "s"]));
    running.wait_for("waiting for a front-end");
    assert_eq!(limit_bytes(&running, "Max file size"), 1 << 20);
    let mut front_end = front_end(&place, VhostUserProtocolFeatures::CONFIG);
    assert_eq!(capacity_sectors(&mut front_end), (1 << 20) / 512);

    let mut expected_bytes = 1 << 20;
    for (size_bytes, is_usable) in [(3 << 20, true), ((3 << 20) + 100, false), (1 << 19, true)] {
        image.set_len(size_bytes).unwrap();
        running.signal(Signal::HUP);
        if is_usable {
            expected_bytes = size_bytes;
        } else {
            let line = running.wait_for("keeps its size");
            assert_has(&line, &["not a multiple of its 512-byte blocks"]);
        }
        let started = Instant::now();
        while capacity_sectors(&mut front_end) != expected_bytes / 512 {
            assert!(started.elapsed() < LIMIT, "the size of {size_bytes} bytes is not told");
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(limit_bytes(&running, "Max file size"), expected_bytes);
    }
}

/// A front-end that has these protocol features.
fn front_end(place: &Place, features: VhostUserProtocolFeatures) -> Frontend {
    let mut front_end = Frontend::connect(place.path("s"), 8).unwrap();
    let protocol_features = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    assert_ne!(front_end.get_features().unwrap() & protocol_features, 0);
    front_end.set_features(protocol_features).unwrap();
    assert!(front_end.get_protocol_features().unwrap().contains(features));
    front_end.set_protocol_features(features).unwrap();
    front_end
}

#[test]
fn an_image_grows_in_a_running_server_to_max_size_only() {
    const MIB: u64 = 1 << 20;
    for (options, max_bytes, size_bytes) in
        [(&[][..], 256 * MIB, 257 * MIB), (&["--max-size", "300M"], 300 * MIB, 301 * MIB)]
    {
        let place = Place::new();
        let image = File::options().write(true).open(place.path("disk.img")).unwrap();
        image.set_len(256 * MIB).unwrap();
        let running = Running::start(&mut place.serve(&[&["--socket-path", "s"], options].concat()));
        running.wait_for("waiting for a front-end");
        let mut front_end = front_end(&place, VhostUserProtocolFeatures::CONFIG);
        image.set_len(max_bytes).unwrap();
        running.signal(Signal::HUP);
        let started = Instant::now();
        while capacity_sectors(&mut front_end) != max_bytes / 512 {
            assert!(started.elapsed() < LIMIT, "the size of {max_bytes} bytes is not told");
            std::thread::sleep(Duration::from_millis(2));
        }
        image.set_len(size_bytes).unwrap();
        running.signal(Signal::HUP);
        let line = running.wait_for("keeps its size");
        assert_has(&line, &[&format!("this server may serve {max_bytes} at most"), "restart the server", "--max-size"]);
        assert_eq!(capacity_sectors(&mut front_end), max_bytes / 512);
    }
}

#[test]
fn the_log_names_a_waiting_front_end_and_the_served_one() {
    let place = Place::new();
    let running = Running::start(&mut place.serve(&["--socket-path", "s"]));
    running.wait_for("waiting for a front-end");
    let first = front_end(&place, VhostUserProtocolFeatures::CONFIG);
    let us = std::process::id();
    // A second server checks whether a process listens. It is not a front-end.
    assert_has(&place.refusal(&["--socket-path", "s", "--incoming"]), &["another process listens there"]);
    let mut second = UnixStream::connect(place.path("s")).unwrap();
    second.write_all(&[0]).unwrap();
    let line = running.wait_for("another front-end is connected; it waits until the served one disconnects");
    assert_has(&line, &[&format!(" pid={us} "), &format!("served_pid={us}")]);
    drop(second);
    drop(first);
    running.wait_for("front-end disconnected");
}

#[test]
fn an_in_flight_region_may_be_larger_than_the_disk() {
    let place = Place::new();
    File::create(place.path("small.img")).unwrap().set_len(64 << 10).unwrap();
    let options = ["--socket-path", "s", "--blk-file", "small.img", "--num-queues", "8", "--queue-size", "1024"];
    let running = Running::start(&mut place.command(PROGRAMS[0], &options));
    running.wait_for("waiting for a front-end");
    let mut front_end = front_end(&place, VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    let asked = VhostUserInflight { num_queues: 8, queue_size: 1024, ..VhostUserInflight::default() };
    let (made, file) = front_end.get_inflight_fd(&asked).unwrap();
    assert!(made.mmap_size > 64 << 10);
    assert_eq!(file.metadata().unwrap().len(), made.mmap_size);
    assert_eq!(limit_bytes(&running, "Max file size"), 64 << 10, "the disk cannot grow now as before");
}

/// The private memory of a server in KiB, and the number of its descriptors, if it offers `queues` queues.
fn costs_of_queues(queues: &str) -> (u64, usize) {
    let place = Place::new();
    let running = Running::start(&mut place.serve(&["--socket-path", "s", "--num-queues", queues]));
    running.wait_for_all(&["waiting for a front-end", "the server executes requests from now on"]);
    // The workers have made their first poll iteration.
    assert!(is_answered(&UnixStream::connect(place.path("s")).unwrap()));
    let proc = PathBuf::from(format!("/proc/{}", running.child.id()));
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let memory_kib = line.trim().trim_end_matches(" kB").parse().unwrap();
    // The connection may still be open.
    let fds = fs::read_dir(proc.join("fd")).unwrap().filter_map(Result::ok);
    (
        memory_kib,
        fds.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| !to.to_string_lossy().contains("socket"))).count(),
    )
}

#[test]
fn unused_queues_cost_next_to_nothing() {
    // The same number of I/O threads in both cases.
    let cpus = std::thread::available_parallelism().unwrap().get().clamp(1, 128);
    let (few, many) = (costs_of_queues(&cpus.to_string()), costs_of_queues("256"));
    let each_bytes = many.0.saturating_sub(few.0) * 1024 / (256 - cpus as u64);
    eprintln!("{cpus} queues: {} KiB; 256 queues: {} KiB; {each_bytes} bytes each", few.0, many.0);
    assert!(each_bytes < 8 << 10, "{each_bytes} bytes for each queue that is offered and not used");
    assert_eq!(few.1, many.1, "descriptors");
}

#[test]
fn a_closed_log_does_not_end_the_server() {
    let place = Place::new();
    let mut command = place.serve(&["--socket-path", "s"]);
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("waiting for a front-end") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "the server has ended");
    }
    drop(log);
    let mut running = Running { child, lines: channel().1 };
    for _ in 0..2 {
        assert!(is_answered(&UnixStream::connect(place.path("s")).unwrap()));
    }
    running.signal(Signal::TERM);
    assert_eq!(running.end().code(), Some(0));
}

#[test]
fn a_server_accepts_front_ends_again_when_it_has_free_descriptors() {
    let place = Place::new();
    let running = Running::start(&mut place.serve(&["--socket-path", "s"]));
    // Until then the server needs descriptors itself.
    running.wait_for_all(&["waiting for a front-end", "the server executes requests from now on"]);
    let pid = Some(Pid::from_child(&running.child));
    let limit = |current| Rlimit { current: Some(current), maximum: Some(1 << 10) };
    // 0, 1 and 2 are in use. With a lower limit poll(2) would refuse to wait for as many descriptors as the server does.
    prlimit(pid, Resource::Nofile, limit(3)).unwrap();
    let front_end = UnixStream::connect(place.path("s")).unwrap();
    running.wait_for("no front-end can be accepted");
    prlimit(pid, Resource::Nofile, limit(1 << 10)).unwrap();
    assert!(is_answered(&front_end));
}
