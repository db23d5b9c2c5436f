//! Start-up: options, refusals, sockets, the disk.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;

use nix::libc;
use ringpass_broker::disk::{Disk, DiskConfig};
use rustix::process::Signal;
use serde_json::Value;

use super::program::*;

#[test]
fn print_capabilities_prints_json_without_other_options() {
    let place = Place::new();
    for program in PROGRAMS {
        let output = place.command(program, &["--print-capabilities"]).output().unwrap();
        assert!(output.status.success());
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(printed, serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] }));
    }
}

#[test]
fn the_qemu_descriptor_names_the_built_program() {
    let text = fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("share/qemu/vhost-user/50-vhost-user-ringpass.json"),
    )
    .unwrap();
    let descriptor: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(descriptor["type"], "block");
    assert!(descriptor["description"].is_string());
    let binary = Path::new(descriptor["binary"].as_str().unwrap());
    assert!(binary.is_absolute());
    assert_eq!(binary.file_name(), Path::new(PROGRAMS[1].0).file_name());
    let known = ["description", "type", "binary", "tags"];
    assert!(descriptor.as_object().unwrap().keys().all(|key| known.contains(&key.as_str())), "{text}");
}

#[test]
fn the_systemd_unit_starts_the_program_and_gives_it_no_privileges() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("share/systemd/ringpass@.service");
    let unit = fs::read_to_string(path).unwrap();
    for line in [
        "CapabilityBoundingSet=",
        "NoNewPrivileges=yes",
        "LimitMEMLOCK=infinity",
        "MemoryMax=80%",
        "User=ringpass-%i",
        "RuntimeDirectory=ringpass/%i",
    ] {
        assert!(unit.lines().any(|found| found == line), "{line}");
    }
    let settings = unit.lines().filter(|line| !line.starts_with(['#', '[']) && !line.is_empty());
    assert!(settings.clone().all(|line| line.contains('=')), "each line is a comment, a section or a setting");

    let place = Place::new();
    let start = settings.clone().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let directory = place.path("").display().to_string();
    let start = start.replace("/run/ringpass/%i/", &directory).replace("%i", "vm1");
    let start = start.replace("${DISK}", "disk.img").replace("$OPTIONS", "--num-queues 2");
    let mut words = start.split(' ');
    assert_eq!(words.next().map(Path::new).and_then(Path::file_name), Path::new(PROGRAMS[0].0).file_name());
    let words: Vec<&str> = words.collect();
    let mut running = Running::start(&mut place.command((PROGRAMS[0].0, &[]), &words));
    running.wait_for("waiting for a front-end");
    assert!(is_answered(&UnixStream::connect(place.path("vm1.sock")).unwrap()));
    assert!(place.path("vm1.control").exists());
    // ExecReload.
    running.signal(Signal::HUP);
    running.wait_for("looking at the size of the disk");
    running.signal(Signal::TERM);
    assert_eq!(running.end().code(), Some(0));
}

#[test]
fn both_programs_answer_and_end_on_a_signal_without_leaving_a_socket() {
    for (program, signal) in PROGRAMS.into_iter().zip([Signal::TERM, Signal::INT]) {
        let place = Place::new();
        let mut command = place.command(program, &["--socket-path", "s", "--blk-file", "disk.img"]);
        let mut running = Running::start(&mut command);
        running.wait_for("waiting for a front-end");
        let front_end = UnixStream::connect(place.path("s")).unwrap();
        assert!(is_answered(&front_end));
        running.signal(signal);
        assert_eq!(running.end().code(), Some(0));
        assert!(!place.path("s").exists());
        // The disk is free again.
        Disk::open(&DiskConfig::new(place.path("disk.img")).lock_wait(LIMIT)).unwrap();
    }
}

#[test]
fn a_listening_socket_can_be_passed() {
    let place = Place::new();
    let listener = UnixListener::bind(place.path("s")).unwrap();
    let mut running = Running::start(place.serve(&["--fd", "0"]).stdin(OwnedFd::from(listener)));
    for _ in 0..2 {
        assert!(is_answered(&UnixStream::connect(place.path("s")).unwrap()));
    }
    running.signal(Signal::TERM);
    assert_eq!(running.end().code(), Some(0));
    assert!(place.path("s").exists(), "the server does not remove a socket that it did not create");
}

#[test]
fn a_policy_file_is_checked_before_the_disk_is_locked() {
    let place = Place::new();
    let ringpass = |arguments: &[&str]| place.command((PROGRAMS[0].0, &[]), arguments).output().unwrap();
    let shown = ringpass(&["policy", "show", "direct-read-write", "--toml"]);
    assert!(shown.status.success());
    fs::write(place.path("own.toml"), shown.stdout).unwrap();
    for mode in ["direct", "virtqueue"] {
        let options = ["--socket-path", "s", "--policy", "own.toml", "--mode", mode];
        let mut running = Running::start(&mut place.serve(&options));
        running.wait_for("waiting for a front-end");
        running.signal(Signal::TERM);
        assert_eq!(running.end().code(), Some(0));
    }

    fs::write(place.path("bad.toml"), "version = 1\nsqe = 7\n").unwrap();
    let _holder = Disk::open(&DiskConfig::new(place.path("disk.img"))).unwrap();
    let refusal = place.refusal(&["--socket-path", "s", "--policy", "bad.toml", "--mode", "virtqueue"]);
    assert_has(&refusal, &["bad.toml"]);
    let refusal = place.refusal(&["--socket-path", "s", "--policy", "none.toml"]);
    assert_has(&refusal, &["none.toml", "direct-read-write"]);
}

#[test]
fn a_server_on_a_connected_socket_ends_with_its_front_end() {
    let place = Place::new();
    let (front_end, back_end) = UnixStream::pair().unwrap();
    let mut running = Running::start(place.serve(&["--fd", "0"]).stdin(OwnedFd::from(back_end)));
    assert!(is_answered(&front_end));
    drop(front_end);
    assert_eq!(running.end().code(), Some(0));
}

#[test]
fn a_socket_file_of_an_ended_server_is_replaced() {
    let place = Place::new();
    drop(UnixListener::bind(place.path("s")).unwrap());
    let running = Running::start(&mut place.serve(&["--socket-path", "s"]));
    running.wait_for("waiting for a front-end");
    assert!(is_answered(&UnixStream::connect(place.path("s")).unwrap()));
}

#[test]
fn a_failed_start_prints_one_line_with_the_reason() {
    let place = Place::new();
    let _used = UnixListener::bind(place.path("used")).unwrap();
    File::create(place.path("small.img")).unwrap().set_len(512).unwrap();
    fs::write(place.path("text"), "x").unwrap();
    let serve = |options: &[&str]| {
        let command = place.command(PROGRAMS[0], &[&["--socket-path", "s"], options].concat()).output();
        one_line_of_failure(command.unwrap())
    };
    assert_has(&serve(&["--blk-file", "none.img"]), &["cannot open disk \"none.img\"", "`truncate -s 10G none.img`"]);
    assert_has(&serve(&["--blk-file", "."]), &["is a directory: a disk is a regular file or a block device"]);
    assert_has(&serve(&["--blk-file", "text", "--direct-io", "off"]), &["not a multiple of its 512-byte blocks"]);
    assert_has(
        &serve(&["--blk-file", "small.img", "--direct-io", "off", "--logical-block-size", "4096"]),
        &["has 512 bytes, which is not a multiple of its 4096-byte blocks", "or leave out --logical-block-size"],
    );
    assert_has(&serve(&["--blk-file", "disk.img", "--cpus", "8000"]), &["CPU 8000"]);
    assert!(!place.path("s").exists());

    assert_has(&place.refusal(&["--socket-path", "used"]), &["used: another process listens there"]);
    assert_has(&place.refusal(&["--socket-path", "text"]), &["text: a file that is not a socket is in the way"]);
    assert_has(&place.refusal(&["--socket-path", "no/such/directory"]), &["no/such/directory", "No such file"]);
    assert_has(&place.refusal(&["--fd", "0"]), &["file descriptor 0 is not a Unix stream socket"]);
    assert_has(&place.refusal(&["--fd", "77"]), &["file descriptor 77"]);
    assert_eq!(fs::read(place.path("text")).unwrap(), b"x");
}

/// Another process has locked the disk, so each server would wait for it.
#[test]
fn options_are_checked_before_the_disk_is_locked_and_sockets_are_created() {
    let place = Place::new();
    fs::write(place.path("text"), "x").unwrap();
    fs::write(place.path("bad.toml"), "version = 1\nsqe = 7\n").unwrap();
    let _holder = Disk::open(&DiskConfig::new(place.path("disk.img"))).unwrap();
    let files = || {
        let mut names: Vec<_> = fs::read_dir(place.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = files();
    let (long, with_socket) = ("x".repeat(120), ["--socket-path", "s"]);
    for (options, parts) in [
        (&["--sq-cpu", "8000"][..], &["--sq-cpu: ", "CPU 8000", "online CPUs"][..]),
        (&["--sq-cpu", "8000", "--mode", "virtqueue"], &["--sq-cpu: ", "CPU 8000"]),
        (&["--cpus", "8000"], &["--cpus: ", "CPU 8000", "Cpus_allowed_list"]),
        (&["--policy", "bad.toml"], &["bad.toml"]),
        (&["--policy", "none.toml"], &["none.toml"]),
        (&["--control-socket", "no/c"], &["--control-socket: no/c", "Make its directory first"]),
        (&["--control-socket", "text"], &["--control-socket: text", "not a socket is in the way"]),
        (&["--control-socket", &long], &["--control-socket: ", "at most 107 bytes"]),
        (&["--control-socket", "s"], &["--socket-path s is also the path of the control socket"]),
        (&["--control-socket", "./s"], &["--socket-path s is also the path of the control socket"]),
    ] {
        let options = [&["--lock-wait-s", "3600"], &with_socket[..], options].concat();
        assert_has(&place.refusal(&options), parts);
    }
    for (options, parts) in [
        (&["--socket-path", "no/s"][..], &["--socket-path: no/s", "Make its directory first"][..]),
        (&["--socket-path", "text/s"], &["--socket-path: text/s", "Not a directory"]),
        (&["--socket-path", "text"], &["--socket-path: text: a file that is not a socket is in the way"]),
        (&["--socket-path", "."], &["--socket-path: .", "is in the way"]),
        (&["--socket-path", &long], &["--socket-path: ", "at most 107 bytes, this one has 120"]),
        (&["--socket-path", "vm.control"], &["--socket-path vm.control is also the path of the control socket"]),
        (&["--socket-path", "/proc/s"], &["--socket-path: /proc/s: making a socket there"]),
        (&["--fd", "0"], &["--fd: file descriptor 0 is not a Unix stream socket"]),
        (&["--fd", "77"], &["--fd: file descriptor 77"]),
    ] {
        assert_has(&place.refusal(&[&["--lock-wait-s", "3600"], options].concat()), parts);
    }
    let (datagrams, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let unconnected =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    for (socket, part) in
        [(OwnedFd::from(datagrams), "is not a Unix stream socket"), (unconnected, "neither listens nor is connected")]
    {
        let mut command = place.serve(&["--lock-wait-s", "3600", "--fd", "0"]);
        let output = command.env("RUST_LOG", "off").stdin(socket).output().unwrap();
        assert_has(&one_line_of_failure(output), &["--fd: file descriptor 0", part]);
    }
    assert_eq!(files(), before, "something was left");
}

#[test]
fn the_error_on_a_host_that_forbids_io_uring_explains_how_to_allow_it() {
    let place = Place::new();
    let mut command = place.serve(&["--socket-path", "s"]);
    // SAFETY: between fork and exec only system calls are made, on memory of the child's own stack.
    unsafe { command.pre_exec(|| forbid(libc::SYS_io_uring_setup)) };
    let text = one_line_of_failure(command.env("RUST_LOG", "off").output().unwrap());
    assert_has(
        &text,
        &["no guest can be served here", "a seccomp filter refuses io_uring_setup", "--security-opt seccomp="],
    );
    assert!(!place.path("s").exists());
}

#[test]
fn forbidden_landlock_is_not_reported_as_missing() {
    let place = Place::new();
    let mut command = place.serve(&["--socket-path", "s"]);
    // SAFETY: between fork and exec only system calls are made, on memory of the child's own stack.
    unsafe { command.pre_exec(|| forbid(libc::SYS_landlock_create_ruleset)) };
    let running = Running::start(&mut command);
    let line = running.wait_for("landlock_create_ruleset");
    assert_has(&line, &["Operation not permitted", "seccomp filter", "allow landlock_create_ruleset"]);
    running.wait_for("waiting for a front-end");
}

#[test]
fn the_error_for_a_bad_option_states_the_possible_values() {
    let place = Place::new();
    for program in PROGRAMS {
        let options = ["--socket-path", "s", "--blk-file", "disk.img", "--queue-size", "100"];
        let output = place.command(program, &options).output().unwrap();
        assert!(!output.status.success());
        assert!(output.stdout.is_empty());
        assert_has(
            &String::from_utf8(output.stderr).unwrap(),
            &["'--queue-size <N>'", "a power of two from 4 to 32768"],
        );
    }
}

#[test]
fn the_error_for_a_locked_disk_names_the_process() {
    let place = Place::new();
    let _disk = Disk::open(&DiskConfig::new(place.path("disk.img"))).unwrap();
    let text = place.refusal(&["--socket-path", "s", "--lock-wait-s", "0"]);
    assert_has(&text, &["\"disk.img\" is locked", &format!("[{}]", std::process::id())]);
    assert!(!place.path("s").exists());
}

#[test]
fn sigterm_ends_a_server_that_waits_for_its_disk() {
    let place = Place::new();
    let _disk = Disk::open(&DiskConfig::new(place.path("disk.img"))).unwrap();
    let mut running = Running::start(&mut place.serve(&["--socket-path", "s", "--lock-wait-s", "3600"]));
    running.wait_for("is locked");
    running.signal(Signal::TERM);
    assert!(!running.end().success());
}
