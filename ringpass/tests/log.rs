//! The behaviour of a server whose log has no reader.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A limit that even a busy machine keeps.
const LIMIT: Duration = Duration::from_secs(60);
/// GET_FEATURES with no flags except the version (vhost-user, "Header").
const GET_FEATURES: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// A full pipe as standard error of a child, and the number of bytes in it.
fn full_pipe() -> (File, Stdio, usize) {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut writer = File::from(writer);
    let flags = fcntl_getfl(&writer).unwrap();
    fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
    let mut filled_bytes = 0;
    while let Ok(count) = writer.write(&[b'.'; 4096]) {
        filled_bytes += count;
    }
    fcntl_setfl(&writer, flags).unwrap();
    (reader.into(), writer.into(), filled_bytes)
}

/// Killed when dropped.
struct Running(Child);

impl Running {
    /// Waits for its exit status.
    fn end(&mut self) -> Option<i32> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(started.elapsed() < LIMIT, "the program does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(directory: &TempDir, log_level: &str, stderr: Stdio) -> Command {
    File::create(directory.path().join("disk.img")).unwrap().set_len(1 << 20).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringpass"));
    command
        .args(["serve", "--socket-path", "vm.sock", "--blk-file", "disk.img"])
        .current_dir(directory)
        .env("RUST_LOG", log_level)
        .env("RUNTIME_DIRECTORY", directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr);
    command
}

fn connect(directory: &TempDir) -> UnixStream {
    let path = directory.path().join("vm.sock");
    let started = Instant::now();
    loop {
        match UnixStream::connect(&path) {
            Ok(stream) => return stream,
            Err(error) => assert!(started.elapsed() < LIMIT, "no process listens: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_server_with_a_blocked_log_continues_and_reports_missing_lines_later() {
    const MESSAGES: usize = 20_000;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (mut reader, stderr, filled_bytes) = full_pipe();
    let mut server = Running(serve(&directory, "debug", stderr).spawn().unwrap());
    let mut front_end = connect(&directory);
    front_end.set_read_timeout(Some(LIMIT)).unwrap();
    for _ in 0..MESSAGES {
        // At this level each message is a line of the log.
        front_end.write_all(&GET_FEATURES).unwrap();
        front_end.read_exact(&mut [0; 20]).expect("the server continues to answer");
    }
    reader.read_exact(&mut vec![0; filled_bytes]).unwrap();
    let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
    let first = lines.next().unwrap();
    assert!(!first.contains("missing"), "what was logged first is there: {first}");
    let told = lines.find(|line| line.contains("lines of the log are missing here")).unwrap();
    let missing: usize = told.split(' ').nth(1).unwrap().parse().unwrap();
    assert!((1..MESSAGES * 2).contains(&missing), "{told}");

    kill_process(Pid::from_child(&server.0), Signal::TERM).unwrap();
    assert!(lines.any(|line| line.contains("stopping")), "the log continues when it is read");
    assert_eq!(server.end(), Some(0));
}

#[test]
fn a_program_ends_even_if_its_error_cannot_be_written() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (_reader, stderr, _) = full_pipe();
    let mut command = serve(&directory, "warn", stderr);
    std::fs::remove_file(directory.path().join("disk.img")).unwrap();
    assert_eq!(Running(command.spawn().unwrap()).end(), Some(1));
}

#[test]
fn sigterm_ends_a_server_with_a_blocked_log() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (_reader, stderr, _) = full_pipe();
    let mut server = Running(serve(&directory, "info", stderr).spawn().unwrap());
    let mut front_end = connect(&directory);
    front_end.write_all(&GET_FEATURES).unwrap();
    front_end.set_read_timeout(Some(LIMIT)).unwrap();
    front_end.read_exact(&mut [0; 20]).unwrap();
    kill_process(Pid::from_child(&server.0), Signal::TERM).unwrap();
    assert_eq!(server.end(), Some(0));
}
