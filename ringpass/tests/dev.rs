//! `ringpass dev` on served devices, as an operator uses it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ringpass_guest::vhost_user::{Disk, Operation, Options, Way};
use serde_json::Value;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ringpass");
/// A limit that even a busy machine keeps.
const LIMIT: Duration = Duration::from_secs(60);

/// A directory with disks, sockets, and the control sockets of devices.
struct Place(TempDir);

/// A served device, which ends with the test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).current_dir(self.0.path()).env("RUNTIME_DIRECTORY", self.path("run"));
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        command
    }

    fn serve(&self, name: &str) -> Served {
        self.serve_as(name, name, &[])
    }

    /// Serves a device with the name `device`, whose files have the name `name`.
    fn serve_as(&self, name: &str, device: &str, options: &[&str]) -> Served {
        let (socket, image) = (format!("{name}.sock"), format!("{name}.img"));
        File::create(self.path(&image)).unwrap().set_len(1 << 20).unwrap();
        let arguments = [&["serve", "--socket-path", &socket, "--blk-file", &image], options].concat();
        let child = self.command(&arguments).stderr(Stdio::null()).spawn().unwrap();
        let end = Instant::now() + LIMIT;
        while !self.path(&socket).exists() || self.dev(&["show", device]).status.code() != Some(0) {
            assert!(Instant::now() < end, "{name} is not served");
            std::thread::sleep(Duration::from_millis(10));
        }
        Served(child)
    }

    fn dev(&self, arguments: &[&str]) -> Output {
        self.command(&[&["dev"], arguments].concat()).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.dev(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn text(&self, arguments: &[&str]) -> String {
        let output = self.dev(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn list_shows_devices_by_name_and_marks_those_that_are_gone() {
    let place = Place::new();
    assert_eq!(place.text(&["list"]), "no devices\n");
    let (_one, _two) = (place.serve("one"), place.serve_as("two", "second", &["--name", "second"]));
    drop(UnixListener::bind(place.path("run/stale.control")).unwrap());
    let found = place.json(&["list"]);
    let names: Vec<&str> = found.as_array().unwrap().iter().map(|found| found["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["one", "second", "stale"]);
    assert!(found[0]["pid"].is_u64() && found[2]["pid"].is_null());
    assert!(!place.path("run/stale.control").exists(), "the list removes what no process listens on");
    drop(UnixListener::bind(place.path("run/stale.control")).unwrap());
    let output = place.dev(&["show", "stale"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("the device is gone: no process listens on "), "{error}");
    let all = place.text(&["show"]);
    assert!(all.contains("one: pid ") && all.contains("second: pid ") && all.contains("\nstale: gone\n"), "{all}");
    drop(UnixListener::bind(place.path("run/stale.control")).unwrap());
    let list = place.text(&["list"]);
    assert!(list.contains("stale   gone"), "{list}");
    drop(UnixListener::bind(place.path("run/stale.control")).unwrap());
    let output = place.dev(&["show", "three"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("no device three") && error.contains("one, second, stale"), "{error}");
}

#[test]
fn show_and_stats_report_what_executes_each_queue_and_its_counters() {
    let place = Place::new();
    let _served = place.serve_as("vm", "vm", &["--mode", "direct"]);
    let status = place.json(&["show", "vm"]);
    assert_eq!((&status["mode"], &status["rings"]["offered"]), (&"direct".into(), &true.into()));
    assert!(status["rings"]["wants"].as_str().unwrap().contains("virtio-mem"));
    assert_eq!(status["queues"][1]["executed_by"], "virtqueue");

    let options = Options::default().memory_bytes(2 << 20).way(Way::Ring);
    let disk = Disk::connect(place.path("vm.sock"), options).unwrap();
    let mut queue = disk.queue(1).unwrap();
    let mut buffer = disk.allocate(4096).unwrap();
    for _ in 0..10 {
        queue.submit(Operation::Read, buffer, 0, 4096, 0).unwrap();
        let done = queue.wait(LIMIT).unwrap();
        done.result.unwrap();
        buffer = done.buffer;
    }
    disk.flush().unwrap();
    let status = place.json(&["show", "vm"]);
    let ring = &status["queues"][1];
    assert_eq!((&ring["executed_by"], &ring["epoch"], &ring["phase"]), (&"ring".into(), &1.into(), &"open".into()));
    let stats = place.json(&["stats", "vm"]);
    assert_eq!(stats["queues"][1]["by_guest"]["completed"], 10);
    assert_eq!(stats["queues"][1]["by_device"]["reads"], 0);
    assert_eq!(stats["queues"][0]["by_device"]["flushes"], 1);
    let text = place.text(&["show", "vm"]);
    assert!(text.contains("queue 1: ring epoch 1 open sq 64 cq 128"), "{text}");
    assert!(text.contains("; for guests without balloon, free page reporting, virtio-mem and postcopy"), "{text}");
    assert!(place.text(&["stats", "vm"]).lines().nth(2).unwrap().ends_with("10"), "{}", place.text(&["stats", "vm"]));

    queue.detach().unwrap();
    let status = place.json(&["show", &place.path("run/vm.control").display().to_string()]);
    assert_eq!(status["queues"][1]["executed_by"], "virtqueue");
}

#[test]
fn unused_queues_are_counted_but_not_listed() {
    let place = Place::new();
    let _served = place.serve("vm");
    let lines = |what: &str| place.text(&[what, "vm"]).lines().map(str::to_owned).collect::<Vec<_>>();
    let show = lines("show");
    assert!(show.len() < 6 && show.last().unwrap() == "  256 of 256 queues are not used", "{show:?}");
    assert_eq!(lines("stats").len(), 1, "the heading");

    let disk = Disk::connect(place.path("vm.sock"), Options::default().memory_bytes(2 << 20)).unwrap();
    disk.flush().unwrap();
    let show = lines("show");
    assert_eq!(show.last().unwrap(), "  254 of 256 queues are not used");
    assert!(show.iter().any(|line| line == "  queue 0: virtqueue"), "{show:?}");
    assert!(lines("stats")[1].starts_with("0 "), "{:?}", lines("stats"));
    let status = place.json(&["show", "vm"]);
    assert_eq!(status["queues"].as_array().unwrap().len(), 256, "programs get all of them");
    assert_eq!((&status["queues"][1]["started"], &status["queues"][2]["started"]), (&true.into(), &false.into()));
}

#[test]
fn show_reports_why_a_device_offers_no_rings() {
    let place = Place::new();
    let _served = place.serve_as("plain", "plain", &["--read-only"]);
    let text = place.text(&["show", "plain"]);
    assert!(text.contains("rings not offered: the disk is read-only"), "{text}");
}

#[test]
fn misbehaving_clients_block_neither_the_device_nor_other_clients() {
    let place = Place::new();
    let _served = place.serve("vm");
    let connect = || UnixStream::connect(place.path("run/vm.control")).unwrap();
    let idle: Vec<UnixStream> = (0..3).map(|_| connect()).collect();
    (&connect()).write_all(&vec![b'x'; 1 << 16]).unwrap_or_default();
    let garbage = connect();
    (&garbage).write_all(b"\xff\xfe\n").unwrap();
    let disk = Disk::connect(place.path("vm.sock"), Options::default().memory_bytes(2 << 20)).unwrap();
    assert_eq!(disk.geometry().size_bytes, 1 << 20);
    let asking = connect();
    (&asking).write_all(b"{\"request\":\"show\"}\n").unwrap();
    let mut line = String::new();
    BufReader::new(asking).read_line(&mut line).unwrap();
    assert!(line.contains("\"name\":\"vm\""), "{line}");
    drop(idle);
}

#[test]
fn silent_clients_do_not_delay_others() {
    let place = Place::new();
    let _served = place.serve("vm");
    let silent: Vec<UnixStream> = (0..40).map(|_| UnixStream::connect(place.path("run/vm.control")).unwrap()).collect();
    // One after the other, each client would take 2 s.
    let begin = Instant::now();
    place.json(&["show", "vm"]);
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    drop(silent);
}

#[test]
fn a_silent_device_is_not_reported_as_gone() {
    let place = Place::new();
    let _served = place.serve("vm");
    let other = UnixListener::bind(place.path("run/silent.control")).unwrap();
    let hangs_up = std::thread::spawn(move || drop(other.accept().unwrap()));
    let list = place.text(&["list"]);
    assert!(list.contains("silent  silent"), "{list}");
    assert!(list.contains("has hung up without an answer"), "{list}");
    assert!(place.path("run/silent.control").exists(), "it is another's");
    hangs_up.join().unwrap();
}

#[test]
fn watch_continues_after_a_server_restarts() {
    let place = Place::new();
    let served = place.serve("vm");
    let mut child = place.command(&["dev", "stats", "vm", "--watch", "0.1", "--json"]);
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut counts = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let _watching = Served(child);
    let started = |line: &str| serde_json::from_str::<Value>(line).unwrap()["started_ms"].as_u64().unwrap();
    let before = started(&counts.next().unwrap());
    // Kill the server, so that its socket stays, and then remove the socket, as after an orderly end.
    drop(served);
    let line = said.next().unwrap();
    assert!(line.contains("the device is gone") && line.ends_with("; waiting for the device"), "{line}");
    std::fs::remove_file(place.path("run/vm.control")).unwrap();
    std::fs::remove_file(place.path("vm.sock")).unwrap();
    let _served = place.serve("vm");
    assert_eq!(said.next().unwrap(), "ringpass: vm is back");
    assert!(counts.any(|line| started(&line) != before));
}

#[test]
fn a_used_control_socket_is_an_error_if_explicit_and_a_warning_by_default() {
    let place = Place::new();
    let _served = place.serve("vm");
    File::create(place.path("other.img")).unwrap().set_len(1 << 20).unwrap();
    let serve = ["serve", "--socket-path", "other.sock", "--blk-file", "other.img", "--name", "vm"];
    let explicit = [&serve[..], &["--control-socket", "run/vm.control"]].concat();
    let output = place.command(&explicit).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("--control-socket") && error.contains("another process listens there"), "{error}");

    // The default control socket is not worth a failed start: the device runs without it.
    let mut child = place.command(&serve).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let said: Vec<String> = lines.take_while(|line| !line.contains("waiting for a front-end")).collect();
    let _served = Served(child);
    assert!(said.iter().any(|line| line.contains("will not see this device")), "{said:?}");
}

#[test]
fn the_mode_of_a_device_without_rings_cannot_change() {
    let place = Place::new();
    let _served = place.serve_as("vm", "vm", &["--mode", "virtqueue"]);
    for mode in ["virtqueue", "auto"] {
        let output = place.dev(&["set", "vm", "mode", mode]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains("the device offers no rings"), "{error}");
    }
    let output = place.dev(&["set", "vm", "mode", "direct"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("[possible values: auto, virtqueue]"), "{error}");
}

#[test]
fn the_mode_of_a_device_with_rings_changes_and_shows() {
    let place = Place::new();
    let _served = place.serve_as("vm", "vm", &["--mode", "direct"]);
    let text = place.text(&["set", "vm", "mode", "virtqueue"]);
    assert!(text.starts_with("vm: mode virtqueue: all queues are virtqueues (after "), "{text}");
    let status = place.json(&["show", "vm"]);
    assert_eq!(status["mode"], "virtqueue");
    assert_eq!(status["rings"]["closed"], "the operator set mode virtqueue");
    assert_eq!(place.json(&["set", "vm", "mode", "auto"])["mode"], "auto");
    let status = place.json(&["show", "vm"]);
    assert_eq!((&status["mode"], &status["rings"]["closed"]), (&Value::from("direct"), &Value::Null));
}
