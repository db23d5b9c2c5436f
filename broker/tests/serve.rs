//! `ringpass serve` and `vhost-user-ringpass` as whoever starts them meets them: the conventions for the programs of
//! vhost-user back-ends, and what happens when start-up fails.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use ringpass_broker::disk::{Disk, DiskConfig};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;
use tempfile::TempDir;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// Longer than anything takes on a machine with other work.
const LIMIT: Duration = Duration::from_secs(60);

/// Both programs, with the words that come before the options.
const PROGRAMS: [(&str, &[&str]); 2] =
    [(env!("CARGO_BIN_EXE_ringpass"), &["serve"]), (env!("CARGO_BIN_EXE_vhost-user-ringpass"), &[])];

/// A directory with a disk image of 1 MiB.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        File::create(directory.path().join("disk.img")).unwrap().set_len(1 << 20).unwrap();
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A program with these options, in this directory.
    fn command(&self, program: (&str, &[&str]), options: &[&str]) -> Command {
        let mut command = Command::new(program.0);
        command.args(program.1).args(options).current_dir(self.0.path()).stdin(Stdio::null());
        command.env_remove("RUST_LOG").env("RUNTIME_DIRECTORY", self.0.path());
        command
    }

    /// `ringpass serve` on the image.
    fn serve(&self, options: &[&str]) -> Command {
        self.command(PROGRAMS[0], &[&["--blk-file", "disk.img"], options].concat())
    }

    /// The refusal: one line.
    fn refusal(&self, options: &[&str]) -> String {
        one_line_of_failure(self.serve(options).env("RUST_LOG", "off").output().unwrap())
    }
}

fn one_line_of_failure(output: Output) -> String {
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(output.stdout.is_empty());
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("ringpass: "), "{text}");
    text
}

fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

/// A running server; killed when dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let (sender, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { child, lines }
    }

    /// Waits for a line of the log.
    fn wait_for(&self, text: &str) -> String {
        let mut before = Vec::new();
        loop {
            match self.lines.recv_timeout(LIMIT) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => before.push(line),
                Err(error) => panic!("{text:?} does not come ({error}): {before:?}"),
            }
        }
    }

    /// Waits for lines of the log that come in any order.
    fn wait_for_all(&self, texts: &[&str]) {
        let mut missing = texts.to_vec();
        while !missing.is_empty() {
            let line = self.lines.recv_timeout(LIMIT).unwrap_or_else(|error| panic!("{missing:?}: {error}"));
            missing.retain(|text| !line.contains(text));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < LIMIT, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As a container's seccomp filter does by default with io_uring: the call fails with `EPERM` in this process from now on.
fn forbid(call: libc::c_long) -> io::Result<()> {
    let statement = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0), // seccomp_data.nr
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the call takes four integers and sets a flag of this thread.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: the kernel copies the filter, which is alive during the call.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) })?;
    Ok(())
}

/// VHOST_USER_GET_FEATURES: a header of three little-endian words, without a body.
fn is_answered(mut socket: &UnixStream) -> bool {
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let header: Vec<u8> = [1_u32, 1, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    socket.write_all(&header).unwrap();
    let mut answer = [0; 20];
    socket.read_exact(&mut answer).is_ok() && answer[..4] == [1, 0, 0, 0]
}

#[test]
fn capabilities_are_json_and_need_no_other_option() {
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
fn the_descriptor_names_the_program_that_is_built() {
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
    for line in ["CapabilityBoundingSet=", "NoNewPrivileges=yes", "LimitMEMLOCK=infinity", "MemoryMax=80%"] {
        assert!(unit.lines().any(|found| found == line), "{line}");
    }
    let settings = unit.lines().filter(|line| !line.starts_with(['#', '[']) && !line.is_empty());
    assert!(settings.clone().all(|line| line.contains('=')), "each line is a comment, a section or a setting");

    let place = Place::new();
    let start = settings.clone().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let directory = place.path("").display().to_string();
    let start = start.replace("/run/ringpass/", &directory).replace("%i", "vm1");
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
        Disk::open(&DiskConfig { lock_wait: Some(LIMIT), ..DiskConfig::new(place.path("disk.img")) }).unwrap();
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
    assert!(place.path("s").exists(), "whoever made the socket removes it");
}

#[test]
fn a_policy_file_of_one_s_own_is_read_and_one_with_a_mistake_refused_before_the_disk_is_taken() {
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
fn a_socket_that_an_ended_server_left_is_replaced() {
    let place = Place::new();
    drop(UnixListener::bind(place.path("s")).unwrap());
    let running = Running::start(&mut place.serve(&["--socket-path", "s"]));
    running.wait_for("waiting for a front-end");
    assert!(is_answered(&UnixStream::connect(place.path("s")).unwrap()));
}

#[test]
fn a_start_that_fails_says_why_in_one_line() {
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
    assert_has(&serve(&["--blk-file", "text", "--direct-io", "off"]), &["no multiple of its blocks of 512 bytes"]);
    assert_has(
        &serve(&["--blk-file", "small.img", "--direct-io", "off", "--logical-block-size", "4096"]),
        &["has 512 bytes, which is no multiple of its blocks of 4096 bytes", "or leave out --logical-block-size"],
    );
    assert_has(&serve(&["--blk-file", "disk.img", "--cpus", "8000"]), &["CPU 8000"]);
    assert!(!place.path("s").exists());

    assert_has(&place.refusal(&["--socket-path", "used"]), &["used: another process listens there"]);
    assert_has(&place.refusal(&["--socket-path", "text"]), &["text: a file that is no socket is in the way"]);
    assert_has(&place.refusal(&["--socket-path", "no/such/directory"]), &["no/such/directory", "No such file"]);
    assert_has(&place.refusal(&["--fd", "0"]), &["file descriptor 0 is not a Unix stream socket"]);
    assert_has(&place.refusal(&["--fd", "77"]), &["file descriptor 77"]);
    assert_eq!(fs::read(place.path("text")).unwrap(), b"x");
}

/// The disk is locked by another process, for which each server would wait.
#[test]
fn what_is_wrong_with_the_options_is_said_before_the_disk_is_locked_or_a_socket_made() {
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
        (&["--control-socket", "text"], &["--control-socket: text", "no socket is in the way"]),
        (&["--control-socket", &long], &["--control-socket: ", "at most 107 bytes"]),
        (&["--control-socket", "s"], &["--control-socket s is also the --socket-path"]),
    ] {
        let options = [&["--lock-wait-s", "3600"], &with_socket[..], options].concat();
        assert_has(&place.refusal(&options), parts);
    }
    for (options, parts) in [
        (&["--socket-path", "no/s"][..], &["--socket-path: no/s", "Make its directory first"][..]),
        (&["--socket-path", "text/s"], &["--socket-path: text/s", "Not a directory"]),
        (&["--socket-path", "text"], &["--socket-path: text: a file that is no socket is in the way"]),
        (&["--socket-path", "."], &["--socket-path: .", "is in the way"]),
        (&["--socket-path", &long], &["--socket-path: ", "at most 107 bytes, this one has 120"]),
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
fn a_host_that_forbids_io_uring_is_explained_with_how_to_allow_it() {
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
fn landlock_that_is_forbidden_is_not_taken_for_a_kernel_without_it() {
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
fn a_bad_option_is_named_with_the_values_that_are_possible() {
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
fn a_disk_that_a_living_process_has_is_refused_after_the_grace_and_the_process_named() {
    let place = Place::new();
    let _disk = Disk::open(&DiskConfig::new(place.path("disk.img"))).unwrap();
    let text = place.refusal(&["--socket-path", "s", "--lock-wait-s", "0"]);
    assert_has(&text, &["\"disk.img\" is locked", &format!("[{}]", std::process::id())]);
    assert!(!place.path("s").exists());
}

#[test]
fn a_server_that_waits_for_its_disk_ends_on_sigterm() {
    let place = Place::new();
    let _disk = Disk::open(&DiskConfig::new(place.path("disk.img"))).unwrap();
    let mut running = Running::start(&mut place.serve(&["--socket-path", "s", "--lock-wait-s", "3600"]));
    running.wait_for("is locked");
    running.signal(Signal::TERM);
    assert!(!running.end().success());
}

/// Starts the first vring, as a front-end does when its guest runs. It goes on until what this gives is dropped.
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

/// Fails if somebody waits for the disk. That nobody comes can only be seen by giving them time.
fn assert_nobody_waits(place: &Place) {
    for _ in 0..10 {
        Disk::open(&DiskConfig::new(place.path("disk.img"))).expect("nobody else wants the disk");
        std::thread::sleep(Duration::from_millis(30));
    }
}

#[test]
fn the_destination_of_a_migration_takes_the_disk_when_its_guest_runs_and_the_source_has_let_go() {
    let place = Place::new();
    let source = || Disk::open(&DiskConfig::new(place.path("disk.img"))).unwrap();
    let disk = source();
    let mut running = Running::start(&mut place.serve(&["--socket-path", "s", "--incoming"]));
    running.wait_for("waiting for a front-end");
    let mut front_end = front_end(&place, VhostUserProtocolFeatures::CONFIG);
    assert_eq!(capacity_sectors(&mut front_end), (1 << 20) / 512);
    // The guest is reset while its memory is copied: the source gives the disk back and asks for it again.
    drop(disk);
    assert_nobody_waits(&place);
    let disk = source();
    let _vring = start_vring(&mut front_end);
    running.wait_for("nothing is executed yet");
    drop(disk);
    running.wait_for("the disk is locked for us");
    running.signal(Signal::TERM);
    assert_eq!(running.end().code(), Some(0));
}

#[test]
fn a_destination_whose_front_end_is_gone_leaves_the_disk_to_the_source() {
    let place = Place::new();
    let disk = Disk::open(&DiskConfig::new(place.path("disk.img"))).unwrap();
    let running = Running::start(&mut place.serve(&["--socket-path", "s", "--incoming"]));
    running.wait_for("waiting for a front-end");
    let mut front_end = front_end(&place, VhostUserProtocolFeatures::CONFIG);
    let _vring = start_vring(&mut front_end);
    running.wait_for("nothing is executed yet");
    drop(front_end);
    running.wait_for("front-end disconnected");
    drop(disk);
    // A look that had begun before may still have it for a moment.
    Disk::open(&DiskConfig { lock_wait: Some(LIMIT), ..DiskConfig::new(place.path("disk.img")) }).unwrap();
    assert_nobody_waits(&place);
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
fn a_resized_image_has_its_new_size_after_sighup_and_cannot_grow_beyond_it() {
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
            assert_has(&line, &["no multiple of its blocks"]);
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
fn a_front_end_that_waits_for_another_one_is_told_in_the_log_with_both_process_ids() {
    let place = Place::new();
    let running = Running::start(&mut place.serve(&["--socket-path", "s"]));
    running.wait_for("waiting for a front-end");
    let first = front_end(&place, VhostUserProtocolFeatures::CONFIG);
    let us = std::process::id();
    let second = UnixStream::connect(place.path("s")).unwrap();
    let line = running.wait_for("another front-end is connected; it waits until the one that is served is gone");
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

/// Memory of its own that a server has, in KiB, and its descriptors, when it offers so many queues.
fn costs_of_queues(queues: &str) -> (u64, usize) {
    let place = Place::new();
    let running = Running::start(&mut place.serve(&["--socket-path", "s", "--num-queues", queues]));
    running.wait_for_all(&["waiting for a front-end", "requests are executed from now on"]);
    // Its workers have made their first turn.
    assert!(is_answered(&UnixStream::connect(place.path("s")).unwrap()));
    let proc = PathBuf::from(format!("/proc/{}", running.child.id()));
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let memory_kib = line.trim().trim_end_matches(" kB").parse().unwrap();
    // The connection may be still there.
    let fds = fs::read_dir(proc.join("fd")).unwrap().filter_map(Result::ok);
    (
        memory_kib,
        fds.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| !to.to_string_lossy().contains("socket"))).count(),
    )
}

#[test]
fn queues_that_no_front_end_uses_cost_next_to_nothing() {
    // As many threads for I/O in both.
    let cpus = std::thread::available_parallelism().unwrap().get().clamp(1, 128);
    let (few, many) = (costs_of_queues(&cpus.to_string()), costs_of_queues("256"));
    let each_bytes = many.0.saturating_sub(few.0) * 1024 / (256 - cpus as u64);
    eprintln!("{cpus} queues: {} KiB; 256 queues: {} KiB; {each_bytes} bytes each", few.0, many.0);
    assert!(each_bytes < 8 << 10, "{each_bytes} bytes for each queue that is offered and not used");
    assert_eq!(few.1, many.1, "descriptors");
}

#[test]
fn a_log_that_nobody_reads_any_more_ends_nothing() {
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
fn a_server_without_free_descriptors_accepts_as_soon_as_it_has_one() {
    let place = Place::new();
    let running = Running::start(&mut place.serve(&["--socket-path", "s"]));
    // Until then it needs descriptors of its own.
    running.wait_for_all(&["waiting for a front-end", "requests are executed from now on"]);
    let pid = Some(Pid::from_child(&running.child));
    let limit = |current| Rlimit { current: Some(current), maximum: Some(1 << 10) };
    // 0, 1 and 2 are in use. With a lower limit poll(2) would refuse to wait for as many descriptors as the server does.
    prlimit(pid, Resource::Nofile, limit(3)).unwrap();
    let front_end = UnixStream::connect(place.path("s")).unwrap();
    running.wait_for("no front-end can be accepted");
    prlimit(pid, Resource::Nofile, limit(1 << 10)).unwrap();
    assert!(is_answered(&front_end));
}
