//! The programs as processes, in a directory with a disk image.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A limit that even a busy machine keeps.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Both programs, with the words that come before the options.
pub(crate) const PROGRAMS: [(&str, &[&str]); 2] =
    [(env!("CARGO_BIN_EXE_ringpass"), &["serve"]), (env!("CARGO_BIN_EXE_vhost-user-ringpass"), &[])];

/// A directory with a disk image of 1 MiB.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        File::create(directory.path().join("disk.img")).unwrap().set_len(1 << 20).unwrap();
        Self(directory)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A program with these options, in this directory.
    pub(crate) fn command(&self, program: (&str, &[&str]), options: &[&str]) -> Command {
        let mut command = Command::new(program.0);
        command.args(program.1).args(options).current_dir(self.0.path()).stdin(Stdio::null());
        command.env_remove("RUST_LOG").env("RUNTIME_DIRECTORY", self.0.path());
        command
    }

    /// `ringpass serve` on the image.
    pub(crate) fn serve(&self, options: &[&str]) -> Command {
        self.command(PROGRAMS[0], &[&["--blk-file", "disk.img"], options].concat())
    }

    /// The error of a failed start: one line.
    pub(crate) fn refusal(&self, options: &[&str]) -> String {
        one_line_of_failure(self.serve(options).env("RUST_LOG", "off").output().unwrap())
    }
}

pub(crate) fn one_line_of_failure(output: Output) -> String {
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(output.stdout.is_empty());
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("ringpass: "), "{text}");
    text
}

pub(crate) fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

/// A running server. Dropping the value kills it.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) lines: Receiver<String>,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
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
    pub(crate) fn wait_for(&self, text: &str) -> String {
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
    pub(crate) fn wait_for_all(&self, texts: &[&str]) {
        let mut missing = texts.to_vec();
        while !missing.is_empty() {
            let line = self.lines.recv_timeout(LIMIT).unwrap_or_else(|error| panic!("{missing:?}: {error}"));
            missing.retain(|text| !line.contains(text));
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn end(&mut self) -> ExitStatus {
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

/// Makes the system call fail with `EPERM` in this process from now on, as a container's default seccomp filter does
/// for io_uring.
pub(crate) fn forbid(call: libc::c_long) -> io::Result<()> {
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
pub(crate) fn is_answered(mut socket: &UnixStream) -> bool {
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let header: Vec<u8> = [1_u32, 1, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    socket.write_all(&header).unwrap();
    let mut answer = [0; 20];
    socket.read_exact(&mut answer).is_ok() && answer[..4] == [1, 0, 0, 0]
}
