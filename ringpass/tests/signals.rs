//! The effect of each signal on a server. No signal leaves a socket behind.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ringpass");
/// A limit that even a busy machine keeps.
const LIMIT: Duration = Duration::from_secs(60);

/// The reaction of a server to a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Ends(i32),
    GoesOn,
}

fn signals() -> Vec<(libc::c_int, Effect)> {
    let ending = [(libc::SIGTERM, 0), (libc::SIGINT, 0), (libc::SIGXCPU, 0), (libc::SIGQUIT, 1)];
    let ignored = [
        libc::SIGHUP,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGALRM,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGIO,
        libc::SIGPWR,
        libc::SIGSTKFLT,
        libc::SIGPIPE,
        libc::SIGXFSZ,
        libc::SIGRTMIN(),
        libc::SIGRTMAX(),
    ];
    let ending = ending.into_iter().map(|(signal, status)| (signal, Effect::Ends(status)));
    ending.chain(ignored.into_iter().map(|signal| (signal, Effect::GoesOn))).collect()
}

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

    /// Starts a server without waiting for its start-up.
    fn spawn(&self) -> Server {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--socket-path", "vm.sock", "--blk-file", "disk.img", "--num-queues", "2"]);
        command.current_dir(self.0.path()).env("RUNTIME_DIRECTORY", self.0.path()).env_remove("RUST_LOG");
        Server(command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Starts a server and waits until its start-up has ended.
    fn serve(&self) -> Server {
        let mut server = self.spawn();
        let mut lines = BufReader::new(server.0.stderr.take().unwrap()).lines();
        assert!(lines.by_ref().map_while(Result::ok).any(|line| line.contains("waiting for a front-end")));
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        server
    }

    fn sockets(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "disk.img").collect()
    }

    fn is_answered(&self) -> bool {
        let stream = UnixStream::connect(self.path("vm.control")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        (&stream).write_all(b"{\"request\":\"show\"}\n").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).is_ok_and(|count| count > 0)
    }
}

/// A server. Dropping the value kills it.
struct Server(Child);

impl Server {
    fn signal(&self, signal: libc::c_int) {
        // SAFETY: two integers; the process has not been waited for, so its number is not reused.
        assert_eq!(unsafe { libc::kill(self.0.id() as i32, signal) }, 0);
    }

    /// Whether the kernel has delivered all signals that were sent to it.
    fn has_taken_all(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap();
        pending.trim().chars().all(|digit| digit == '0')
    }

    fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the server does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn await_delivery(&self) {
        let end = Instant::now() + LIMIT;
        while !self.has_taken_all() {
            assert!(Instant::now() < end, "a signal stays pending");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// VHOST_USER_GET_FEATURES: a header of three little-endian words, without a body.
fn front_end(place: &Place) -> UnixStream {
    let mut socket = UnixStream::connect(place.path("vm.sock")).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let header: Vec<u8> = [1_u32, 1, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    socket.write_all(&header).unwrap();
    socket.read_exact(&mut [0; 20]).unwrap();
    socket
}

#[test]
fn every_signal_except_sigkill_ends_a_server_cleanly_or_has_no_effect() {
    for is_connected in [false, true] {
        let place = Place::new();
        let mut running = None;
        for (signal, effect) in signals() {
            let mut server = running.take().unwrap_or_else(|| place.serve());
            let _front_end = is_connected.then(|| front_end(&place));
            server.signal(signal);
            match effect {
                Effect::Ends(status) => {
                    assert_eq!(server.wait().code(), Some(status), "signal {signal}");
                    assert_eq!(place.sockets(), Vec::<String>::new(), "signal {signal}");
                }
                Effect::GoesOn => {
                    // No thread waits for the realtime signals: they stay pending.
                    if signal < libc::SIGRTMIN() {
                        server.await_delivery();
                    }
                    assert!(place.is_answered(), "signal {signal}");
                    running = Some(server);
                }
            }
        }
    }
}

#[test]
fn a_sigbus_that_another_process_sends_is_not_reported_as_lost_memory() {
    let place = Place::new();
    let mut server = place.spawn();
    let mut log = BufReader::new(server.0.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("waiting for a front-end") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "the server has ended");
    }
    server.signal(libc::SIGBUS);
    assert_eq!(server.wait().signal(), Some(libc::SIGBUS));
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert!(!rest.contains("lost"), "{rest}");
}

#[test]
fn a_signal_during_start_up_leaves_no_socket() {
    for (signal, _) in signals() {
        let place = Place::new();
        // Moments between the start of the program and the end of its start-up.
        for delay_us in [0, 1_000, 3_000, 6_000, 10_000, 15_000] {
            let mut server = place.spawn();
            std::thread::sleep(Duration::from_micros(delay_us));
            server.signal(signal);
            // End the server if that signal has not ended it.
            server.signal(libc::SIGTERM);
            server.wait();
            assert_eq!(place.sockets(), Vec::<String>::new(), "signal {signal} after {delay_us} µs");
        }
    }
}

#[test]
fn the_signals_of_timeout_end_a_server_in_order() {
    let place = Place::new();
    for _ in 0..10 {
        let mut server = place.serve();
        // `timeout(1)` signals its child, and then the process group.
        server.signal(libc::SIGTERM);
        server.signal(libc::SIGCONT);
        server.signal(libc::SIGTERM);
        server.signal(libc::SIGCONT);
        assert_eq!(server.wait().code(), Some(0));
        assert_eq!(place.sockets(), Vec::<String>::new());
    }
}

#[test]
fn the_next_start_replaces_sockets_left_by_sigkill() {
    let place = Place::new();
    let mut server = place.serve();
    server.signal(libc::SIGKILL);
    server.wait();
    assert_eq!(place.sockets().len(), 2);
    let mut server = place.serve();
    assert!(place.is_answered());
    server.signal(libc::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    assert_eq!(place.sockets(), Vec::<String>::new());
}
