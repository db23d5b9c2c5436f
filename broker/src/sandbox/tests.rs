//! A process cannot leave a sandbox, so each test runs in a process of its own, which this program starts.

mod arguments;
mod namespaces;
mod roles;

use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;

use memmap2::MmapOptions;
use nix::libc::{self, c_long};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities};

use super::*;

/// The variable that marks the child process.
const PART: &str = "RINGPASS_SANDBOX_TEST";

/// Runs the test of that name once more, in the sandbox. `None`: this is the child.
fn child(test: &str) -> Option<Output> {
    if std::env::var_os(PART).is_some() {
        return None;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    // One thread: capabilities belong to threads.
    command.args([&format!("sandbox::tests::{test}"), "--exact", "--nocapture", "--test-threads=1"]).env(PART, "child");
    Some(command.output().unwrap())
}

fn assert_success(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}: {text}\n{}", output.status, String::from_utf8_lossy(&output.stdout));
    text
}

/// Runs `body` in a forked process, because the test harness has several threads and a sandbox needs a single one.
fn in_fork(body: impl FnOnce()) {
    // SAFETY: the child continues with one thread, this one. It touches nothing that other threads held: it takes no
    // lock of the test harness, and the allocator supports forks.
    let pid = unsafe { nix::libc::fork() };
    if pid == 0 {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        // SAFETY: this ends the process, without running destructors that belong to other threads.
        unsafe { nix::libc::_exit(if outcome.is_ok() { 0 } else { 1 }) };
    }
    let status = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap();
    assert_eq!(status, nix::sys::wait::WaitStatus::Exited(nix::unistd::Pid::from_raw(pid), 0));
}

fn paths(disk: &File) -> Paths<'_> {
    use std::os::fd::AsFd;
    Paths::none().disk(DiskPath { file: disk.as_fd(), is_written: true })
}

/// Makes a call that the sandbox must refuse, so the kernel uses no argument. Its name is printed for the parent.
fn refused(name: &str, number: c_long, arguments: [u64; 5]) {
    let [one, two, three, four, five] = arguments;
    // SAFETY: the filter ends the call before it begins; the assertion below fails the test if not. No argument is the
    // address of memory in use.
    let result = unsafe { libc::syscall(number, one, two, three, four, five, 0) };
    assert_eq!((result, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EPERM)), "{name}{arguments:x?}");
    eprintln!("tried {name}");
}

/// The child has tried at least so many calls, and the sandbox has refused each of them, and no other.
fn assert_all_refused(output: &Output, tried_min: usize) {
    let text = assert_success(output);
    let tried: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("tried ")).collect();
    assert!(tried.len() >= tried_min, "{text}");
    // The kernel's own EPERM logs nothing.
    for name in &tried {
        let line = format!("the sandbox refused the system call {name} (EPERM)");
        let count = tried.iter().filter(|tried| *tried == name).count();
        assert_eq!(text.matches(&line).count(), count, "{name}: {text}");
    }
    assert_eq!(text.matches("the sandbox refused").count(), tried.len(), "{text}");
}

fn read_status(field: &str) -> String {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().to_owned()
}

#[test]
fn privileges_are_gone_for_good_and_in_every_thread() {
    in_fork(|| {
        let _unprivileged = drop_privileges().unwrap();
        let check = || {
            // See `drop_privileges`.
            let left = capabilities(None).unwrap();
            assert_eq!(left.effective | left.permitted, left.effective & CapabilitySet::IPC_LOCK);
            assert!(left.inheritable.is_empty());
            assert_eq!(read_status("NoNewPrivs"), "1");
        };
        check();
        thread::spawn(check).join().unwrap();
    });
}

#[test]
fn a_process_with_several_threads_is_refused() {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let other = thread::spawn(move || stopped.recv());
    let before = capabilities(None).unwrap();
    let error = drop_privileges().unwrap_err();
    assert!(matches!(error, SandboxError::Threads { threads } if threads > 1), "{error}");
    assert!(error.to_string().contains("already has"), "{error}");
    assert_eq!(capabilities(None).unwrap(), before);
    drop(stop);
    let _ = other.join();
}

#[test]
fn files_beside_the_disk_are_out_of_reach() {
    in_fork(|| {
        let directory = tempfile::tempdir().unwrap();
        let (disk, other) = (directory.path().join("disk"), directory.path().join("other"));
        fs::write(&disk, "d").unwrap();
        fs::write(&other, "o").unwrap();
        let disk_file = File::open(&disk).unwrap();
        let open_before = File::open(&other).unwrap();
        let restricted = drop_privileges().unwrap().restrict_paths(&paths(&disk_file)).unwrap();
        assert!(restricted.has_landlock(), "this kernel has no Landlock");
        assert!(File::options().read(true).write(true).open(&disk).is_ok());
        assert!(fs::read_to_string("/proc/self/status").is_ok());
        for path in [&other, Path::new("/etc/passwd"), Path::new("/proc/self/mem")] {
            let opened = File::options().read(true).write(true).open(path);
            assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{path:?}");
        }
        assert!(fs::read(&other).is_err() && fs::write(directory.path().join("new"), "n").is_err());
        assert!(fs::remove_file(&disk).is_err());
        assert_eq!(io::read_to_string(open_before).unwrap(), "o");
        assert!(TcpListener::bind("127.0.0.1:0").is_err(), "TCP");
        std::mem::forget(directory);
    });
}

#[test]
fn a_refused_system_call_fails_and_is_logged_and_the_process_continues() {
    const NAME: &str = "a_refused_system_call_fails_and_is_logged_and_the_process_continues";
    if let Some(output) = child(NAME) {
        let text = assert_success(&output);
        for call in ["socket", "execve", "kill", "mprotect", "setpriority"] {
            let line = format!("ringpass: the sandbox refused the system call {call} (EPERM)");
            assert!(text.contains(&line), "{call} is missing in: {text}");
        }
        assert!(text.contains("--sandbox off"), "{text}");
        return;
    }
    in_fork(|| {
        let disk = tempfile::tempfile().unwrap();
        let restricted = drop_privileges().unwrap().restrict_paths(&paths(&disk)).unwrap();
        restricted.filter_system_calls(Role::Server).unwrap();
        let refused = || {
            assert!(TcpListener::bind("127.0.0.1:0").is_err());
            assert!(nix::unistd::execve::<&std::ffi::CStr, &std::ffi::CStr>(c"/bin/true", &[], &[]).is_err());
            assert!(nix::sys::signal::kill(nix::unistd::Pid::this(), None).is_err());
            assert!(MmapOptions::new().len(4096).map_anon().and_then(|map| map.make_exec()).is_err());
            assert_eq!(rustix::process::setpriority_process(None, 1), Err(Errno::PERM));
        };
        refused();
        // The calls of serving still work, in new threads too.
        let work = || {
            openat(CWD, "/proc/self/status", OFlags::RDONLY, Mode::empty()).unwrap();
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
            let pages = MmapOptions::new().len(1 << 20).map_anon().unwrap();
            assert_eq!(pages[0], 0);
        };
        thread::spawn(work).join().unwrap();
        assert_eq!(read_status("Seccomp"), "2");
    });
}

#[test]
fn two_threads_that_exit_the_process_at_once_make_no_call_that_the_sandbox_refuses() {
    use std::sync::{Condvar, Mutex};

    const NAME: &str = "two_threads_that_exit_the_process_at_once_make_no_call_that_the_sandbox_refuses";
    /// Whether the first thread is in the middle of `exit(3)`.
    static IS_EXITING: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());
    if let Some(output) = child(NAME) {
        let text = assert_success(&output);
        assert!(!text.contains("the sandbox refused"), "{text}");
        return;
    }
    in_fork(|| {
        extern "C" fn in_the_middle() {
            *IS_EXITING.0.lock().unwrap() = true;
            IS_EXITING.1.notify_all();
            // Time for the second thread to get there; it must then wait for the end of the process.
            thread::sleep(std::time::Duration::from_millis(200));
        }
        let disk = tempfile::tempfile().unwrap();
        let restricted = drop_privileges().unwrap().restrict_paths(&paths(&disk)).unwrap();
        restricted.filter_system_calls(Role::Server).unwrap();
        // SAFETY: the function exists until the end of the process.
        assert_eq!(unsafe { nix::libc::atexit(in_the_middle) }, 0);
        thread::spawn(|| {
            let is_exiting = IS_EXITING.1.wait_while(IS_EXITING.0.lock().unwrap(), |is_exiting| !*is_exiting);
            drop(is_exiting.unwrap());
            std::process::exit(7);
        });
        std::process::exit(0);
    });
}
