//! The errors of the programs: one line without repetition, which names the path or option and, if there is a remedy,
//! the remedy.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use ringpass_broker::disk::{Disk, DiskConfig};
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::{Resource, Rlimit, setrlimit};
use tempfile::TempDir;

/// Shorter parts of a line may occur twice: `x.sock: x.sock is in use` is forbidden, `a: b: a` is permitted.
const REPEATED_CHARS: usize = 6;

/// A directory with all kinds of unsuitable files.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        for (name, len_bytes) in [("disk.img", 1 << 20), ("empty.img", 0), ("odd.img", 1000), ("small.img", 8192)] {
            File::create(place.path(name)).unwrap().set_len(len_bytes).unwrap();
        }
        fs::write(place.path("text"), "x").unwrap();
        fs::write(place.path("bad.toml"), "version = 1\nsqe = 7\n").unwrap();
        fs::create_dir(place.path("dir")).unwrap();
        mkfifoat(CWD, place.path("fifo"), Mode::RUSR | Mode::WUSR).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        command.env("RUST_LOG", "off").env("RUNTIME_DIRECTORY", self.0.path());
        command
    }
}

const RINGPASS: &str = env!("CARGO_BIN_EXE_ringpass");
const VHOST_USER_RINGPASS: &str = env!("CARGO_BIN_EXE_vhost-user-ringpass");

/// Checks the form of an error, and that it contains these parts.
fn assert_refusal(what: &str, program: &str, output: Output, parts: &[&str]) {
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{what} succeeds");
    assert_eq!(text.lines().count(), 1, "{what}: one line: {text}");
    let name = Path::new(program).file_name().unwrap().to_str().unwrap();
    let line = text.trim_end().strip_prefix(&format!("{name}: ")).unwrap_or_else(|| panic!("{what}: no name: {text}"));
    for part in parts {
        assert!(line.contains(part), "{what}: {part:?} is missing in: {line}");
    }
    assert!(line.matches("(os error").count() <= 1, "{what}: the kernel's cause is there twice: {line}");
    let mut said = HashSet::new();
    for part in line.split([':', ';', '.']).map(str::trim).filter(|part| part.chars().count() > REPEATED_CHARS) {
        assert!(said.insert(part), "{what}: {part:?} is there twice: {line}");
    }
    assert!(!line.chars().any(char::is_control), "{what}: {line:?}");
}

#[test]
fn errors_in_a_server_s_options_are_one_line_with_the_remedy() {
    let place = Place::new();
    let _used = UnixListener::bind(place.path("used.sock")).unwrap();
    let _locked = Disk::open(&DiskConfig::new(place.path("small.img"))).unwrap();
    let long = "x".repeat(120);
    let disk = ["--blk-file", "disk.img"];
    let socket = ["--socket-path", "s"];
    let cases: &[(&[&str], [&str; 2], &[&str])] = &[
        // The socket.
        (&disk, ["--socket-path", "no/dir/s"], &["no/dir/s: ", "No such file", "Make its directory first"]),
        (&disk, ["--socket-path", "text/s"], &["text/s: ", "Not a directory", "not a directory"]),
        (&disk, ["--socket-path", "/proc/s"], &["/proc"]),
        (&disk, ["--socket-path", &long], &[&long, "at most 107 bytes", "give a shorter one"]),
        (&disk, ["--socket-path", "used.sock"], &["used.sock: ", "another process listens there; stop it"]),
        (&disk, ["--socket-path", "text"], &["text: ", "not a socket is in the way; remove it"]),
        (&disk, ["--socket-path", "dir"], &["dir: ", "not a socket is in the way"]),
        (&disk, ["--fd", "99"], &["file descriptor 99: ", "Bad file descriptor", "leave the socket open"]),
        (&disk, ["--fd", "0"], &["file descriptor 0 ", "pass a listening or a connected one"]),
        // The control socket.
        (
            &[disk, socket].concat(),
            ["--control-socket", "no/dir/c"],
            &["--control-socket: no/dir/c: ", "Make its directory"],
        ),
        (&[disk, socket].concat(), ["--control-socket", "text"], &["--control-socket: text: ", "remove it"]),
        (&[disk, socket].concat(), ["--control-socket", "used.sock"], &["used.sock: ", "stop it"]),
        // The disk.
        (&socket, ["--blk-file", "none.img"], &["\"none.img\"", "No such file", "`truncate -s 10G none.img`"]),
        (&socket, ["--blk-file", "no/dir/d.img"], &["\"no/dir/d.img\"", "Check the path"]),
        (&socket, ["--blk-file", "text/d.img"], &["\"text/d.img\"", "Not a directory", "Check the path"]),
        (&socket, ["--blk-file", "/dev/no-such-disk"], &["\"/dev/no-such-disk\"", "`lsblk`"]),
        (&socket, ["--blk-file", "dir"], &["\"dir\" is a directory", "a disk is a regular file or a block device"]),
        (&socket, ["--blk-file", "fifo"], &["\"fifo\" is a named pipe"]),
        (&socket, ["--blk-file", "/dev/null"], &["\"/dev/null\" is a character device"]),
        (&socket, ["--blk-file", "used.sock"], &["\"used.sock\" is a socket"]),
        (&socket, ["--blk-file", "empty.img"], &["\"empty.img\"", "`truncate -s 10G empty.img`"]),
        (&socket, ["--blk-file", "odd.img"], &["\"odd.img\" has 1000 bytes", "`truncate -s "]),
        (
            &[&socket[..], &["--lock-wait-s", "0"]].concat(),
            ["--blk-file", "small.img"],
            &["\"small.img\" is locked", "Stop that process first", "--lock-wait-s"],
        ),
        (
            &[&socket[..], &["--blk-file", "odd.img", "--direct-io", "off"]].concat(),
            ["--serial", "s"],
            &["\"odd.img\"", "`truncate -s 1024 odd.img`"],
        ),
        (
            &[&socket[..], &["--read-only"]].concat(),
            ["--blk-file", "none.img"],
            &["\"none.img\" for reading", "Check the path"],
        ),
        // The rest.
        (&[disk, socket].concat(), ["--policy", "none.toml"], &["\"none.toml\"", "No such file", "direct-read-write"]),
        (&[disk, socket].concat(), ["--policy", "bad.toml"], &["bad.toml: ", "line 2, column 7"]),
        (&[disk, socket].concat(), ["--policy", "dir"], &["\"dir\"", "Is a directory"]),
        (&[disk, socket].concat(), ["--policy", "/dev/zero"], &["\"/dev/zero\"", "more than 256 KiB"]),
        (&[disk, socket].concat(), ["--cpus", "8000"], &["CPU 8000"]),
    ];
    for (options, last, parts) in cases {
        let arguments = [options, &last[..]].concat();
        let serve = [&["serve"], &arguments[..]].concat();
        let what = arguments.join(" ");
        assert_refusal(&what, RINGPASS, place.command(RINGPASS, &serve).output().unwrap(), parts);
        let output = place.command(VHOST_USER_RINGPASS, &arguments).output().unwrap();
        assert_refusal(&what, VHOST_USER_RINGPASS, output, parts);
        assert!(!place.path("s").exists(), "{what}: a socket is left");
    }
}

#[test]
fn the_error_names_a_limit_of_open_files_that_is_too_low() {
    let place = Place::new();
    let mut command = place.command(RINGPASS, &["serve", "--socket-path", "s", "--blk-file", "disk.img"]);
    let limit = Rlimit { current: Some(10), maximum: Some(10) };
    // SAFETY: between fork and exec there is one system call.
    unsafe { command.pre_exec(move || Ok(setrlimit(Resource::Nofile, limit)?)) };
    assert_refusal("RLIMIT_NOFILE 10", RINGPASS, command.output().unwrap(), &["RLIMIT_NOFILE"]);
}

#[test]
fn a_disk_without_permission_is_refused_with_useful_advice() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("not run: only root can start programs as another user");
    }
    let place = Place::new();
    for entry in ["", "disk.img"] {
        let mode = if entry.is_empty() { 0o755 } else { 0o600 };
        fs::set_permissions(place.path(entry), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    }
    let program = place.path("ringpass");
    fs::copy(RINGPASS, &program).unwrap();
    for (mode, parts, absent) in
        [(0o600, &["`ls -l disk.img`"][..], "read-only"), (0o644, &["or open it read-only"], "#")]
    {
        fs::set_permissions(place.path("disk.img"), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        let arguments = ["serve", "--socket-path", "s", "--blk-file", "disk.img"];
        let mut command = place.command(program.to_str().unwrap(), &arguments);
        let output = command.uid(1_234_567).gid(1_234_567).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!text.contains(absent), "{text}");
        assert_refusal("a disk of another user", RINGPASS, output, &[parts, &["Permission denied"]].concat());
    }
}

#[test]
fn errors_of_other_commands_are_one_line_without_repetition() {
    let place = Place::new();
    let listener = UnixListener::bind(place.path("deaf.control")).unwrap();
    let hanging_up = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let cases: &[(&[&str], &[&str])] = &[
        (&["dev", "show", "none"], &["no device none", "devices there are: deaf"]),
        (&["dev", "show", "./none"], &["./none", "No such file"]),
        (&["dev", "stats", "text/s"], &["text/s", "Not a directory"]),
        (&["dev", "show", "./text"], &["./text", "Connection refused"]),
        (&["dev", "show", "deaf"], &["deaf.control"]),
        (&["dev", "list", "--runtime-dir", "text"], &["text", "Not a directory"]),
        (&["policy", "show", "none"], &["\"none\"", "No such file", "direct-read-write"]),
        (&["policy", "lint", "bad.toml"], &["bad.toml: ", "line 2, column 7"]),
        (&["policy", "lint", "direct-read-only", "--kernel", "x"], &["\"x\"", "6.12"]),
        (&["policy", "diff", "direct-read-only", "none"], &["\"none\"", "No such file"]),
        (&["demo", "--blk-file", "no/dir/d.img"], &["no/dir/d.img", "No such file"]),
        (&["demo", "--blk-file", "dir"], &["\"dir\" is a directory"]),
        (&["demo", "--blk-file", "small.img"], &["small.img", "at least 262144"]),
        (&["demo", "--policy", "none"], &["\"none\"", "No such file"]),
        (&["demo-guest"], &["started by `ringpass demo`"]),
    ];
    for (arguments, parts) in cases {
        let output = place.command(RINGPASS, arguments).output().unwrap();
        assert_refusal(&arguments.join(" "), RINGPASS, output, parts);
    }
    hanging_up.join().unwrap();
}

#[test]
fn results_that_cannot_be_written_are_an_error() {
    let place = Place::new();
    for arguments in [&["probe"][..], &["policy", "list"], &["dev", "list"], &["serve", "--print-capabilities"]] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = place.command(RINGPASS, arguments).stdout(full).output().unwrap();
        assert_refusal(&arguments.join(" "), RINGPASS, output, &["cannot write", "No space left on device"]);
    }
}
