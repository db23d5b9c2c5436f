//! An interrupted `ringpass demo` leaves no image, no socket and no guest process behind.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use tempfile::TempDir;

/// A limit that even a busy machine keeps.
const LIMIT: Duration = Duration::from_secs(60);

/// The moment at which the test interrupts the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// Directly after the start of the process.
    Started,
    /// The image exists, but may not be filled yet.
    HasImage,
    /// A guest process runs, and a server listens on its socket.
    HasGuests,
}

/// A demo in its own directory. Dropping the value kills the process.
struct Demo {
    child: Child,
    directory: TempDir,
}

impl Demo {
    fn start() -> Self {
        // A shell without job control lets background programs ignore these signals, and the demo would inherit that.
        for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP] {
            // SAFETY: the default action has no handler that could be unsafe to call.
            assert_ne!(unsafe { libc::signal(signal, libc::SIG_DFL) }, libc::SIG_ERR);
        }
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringpass"));
        command.args(["demo", "--seconds", "60", "--blk-file", "new.img"]);
        command.current_dir(&directory).env("TMPDIR", directory.path()).env_remove("RUST_LOG");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { child, directory }
    }

    fn wait_for(&mut self, moment: Moment) {
        self.wait("the moment does not come", |demo| {
            assert!(demo.child.try_wait().unwrap().is_none(), "the demo has ended by itself");
            match moment {
                Moment::Started => true,
                Moment::HasImage => demo.directory.path().join("new.img").exists(),
                Moment::HasGuests => {
                    demo.files().iter().any(|name| name.starts_with("ringpass-demo-")) && demo.has_guests()
                }
            }
        });
    }

    fn wait(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + LIMIT;
        while !is_so(self) {
            assert!(Instant::now() < end, "{what}: {:?}", self.files());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Whether a guest process works in this directory.
    fn has_guests(&self) -> bool {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let is_guest = |process: &Path| {
            fs::read(process.join("cmdline")).is_ok_and(|line| line.ends_with(b"\0demo-guest\0"))
                && fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == self.directory.path())
        };
        processes.into_iter().any(|process| is_guest(&process.path()))
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: two integers; the process has not been waited for, so its number is not reused.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_interrupted_demo_leaves_no_file_and_no_process() {
    let signals =
        [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGALRM];
    for (index, signal) in signals.into_iter().enumerate() {
        // SIGINT and SIGTERM at every moment, the other signals at one moment each.
        let moments = [Moment::HasGuests, Moment::HasImage, Moment::Started];
        let moments = if index < 2 { &moments[..] } else { &moments[index % 3..][..1] };
        for &moment in moments {
            let mut demo = Demo::start();
            demo.wait_for(moment);
            demo.signal(signal);
            let status = demo.child.wait().unwrap();
            let told = status.signal().or(status.code().map(|code| code - 128));
            assert_eq!(told, Some(signal), "{status} after signal {signal} at {moment:?}");
            demo.wait("a guest stays", |demo| !demo.has_guests());
            // Any file counts, because the name of a core dump is not known.
            assert_eq!(demo.files(), Vec::<String>::new(), "signal {signal} at {moment:?}");
        }
    }
}

#[test]
fn the_kernel_kills_the_guest_process_of_a_killed_demo() {
    let mut demo = Demo::start();
    demo.wait_for(Moment::HasGuests);
    demo.signal(libc::SIGKILL);
    demo.child.wait().unwrap();
    demo.wait("a guest stays", |demo| !demo.has_guests());
}
