//! `ringpass demo` that is interrupted: it leaves no image, no socket and no guest process.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use tempfile::TempDir;

/// Longer than anything takes on a machine with other work.
const LIMIT: Duration = Duration::from_secs(60);

/// How far the demo has come when it is interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// Somewhere in its first instructions.
    Started,
    /// The image is there, and perhaps not yet filled.
    HasImage,
    /// A guest process runs, and a server listens on its socket.
    HasGuests,
}

/// A demo in a directory of its own. Killed when dropped.
struct Demo {
    child: Child,
    directory: TempDir,
}

impl Demo {
    fn start() -> Self {
        // A shell without job control has programs in the background ignore them, and the demo would inherit that.
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

    /// Whether a process of the guest works in this directory.
    fn has_guests(&self) -> bool {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let is_guest = |process: &Path| {
            fs::read(process.join("cmdline")).is_ok_and(|line| line.ends_with(b"\0demo-guest\0"))
                && fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == self.directory.path())
        };
        processes.into_iter().any(|process| is_guest(&process.path()))
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: two integers; the process has not been waited for, so that the number is its own.
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
        // SIGINT and SIGTERM at every moment, the others at one each.
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
            // What a core dump of the kernel's would be called is not known.
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
