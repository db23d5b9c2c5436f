//! The `ringpass` program as a user runs it.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

/// The default limit of an ordinary user on Debian.
const MEMLOCK_KIB: u32 = 8192;

static NEXT_USER: AtomicU32 = AtomicU32::new(0);

/// The program at a path that every user can access, and a directory on the same disk that every user can write to.
struct Installed {
    directory: TempDir,
    program: PathBuf,
    /// A separate ordinary user for this test, because the memory that a user pins counts for all processes of the
    /// user.
    uid: u32,
}

impl Installed {
    fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
        let program = directory.path().join("ringpass");
        fs::copy(env!("CARGO_BIN_EXE_ringpass"), &program).unwrap();
        let uid = 1_000_000 + std::process::id() * 64 + NEXT_USER.fetch_add(1, Ordering::Relaxed) % 64;
        Self { directory, program, uid }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The program with `arguments`, in the directory, with a memlock limit, as an ordinary user even if the tests run
    /// as root.
    fn command(&self, memlock_kib: u32, arguments: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", "ulimit -l \"$1\" && shift && exec \"$@\"", "sh", &memlock_kib.to_string()])
            .arg(&self.program)
            .args(arguments)
            .env("TMPDIR", self.path())
            .current_dir(self.path());
        if rustix::process::geteuid().is_root() {
            command.uid(self.uid).gid(self.uid);
        }
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(MEMLOCK_KIB, arguments).output().unwrap()
    }
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("not JSON ({error}): {text}\nstderr: {}", String::from_utf8_lossy(&output.stderr))
    })
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_demo_verifies_every_way_for_an_ordinary_user_with_8_mib_of_memlock() {
    let installed = Installed::new();
    let output = installed.run(&["demo", "--seconds", "0.2", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&output);
    assert!(report["kernel"].as_str().unwrap().starts_with(|first: char| first.is_ascii_digit()));
    let skipped = report["skipped"].as_array().unwrap();
    let kvm_is_closed = |skipped: &Value| skipped["why"].as_str().unwrap().contains("/dev/kvm");
    assert!(skipped.iter().all(kvm_is_closed), "nothing is skipped but what this user may not do: {skipped:?}");
    let ways = report["ways"].as_array().unwrap();
    let names = ["host", "process", "process-kick", "process-vhost-user", "kvm-poll", "kvm-irq", "kvm-kick"];
    let shown = |name: &&str| skipped.iter().all(|skipped| skipped["name"] != **name);
    let expected = names.iter().filter(|name| shown(name)).flat_map(|name| [(*name, 1), (*name, 32)]);
    let found = ways.iter().map(|way| (way["name"].as_str().unwrap(), way["depth"].as_u64().unwrap()));
    assert_eq!(found.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    for way in ways {
        assert_eq!(way["errors"], 0, "{way}");
        assert!(way["verified_bytes"].as_u64().unwrap() > 0, "{way}");
        assert!(way["iops"].as_f64().unwrap() > 0.0, "{way}");
        assert!(way["ratio_to_host"].as_f64().unwrap() > 0.0, "{way}");
        let is_machine = way["name"].as_str().unwrap().starts_with("kvm-");
        assert_eq!(way["exits_per_io"].is_number(), is_machine, "only a virtual machine has VM exits: {way}");
        let percentiles = ["p50_ns", "p99_ns", "p999_ns"].map(|name| way[name].as_u64().unwrap());
        assert!(percentiles[0] > 0 && percentiles.is_sorted(), "{way}");
        let keys: Vec<_> = way.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys.len(), 11, "{keys:?}");
    }
    let left: Vec<_> = fs::read_dir(installed.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["ringpass"], "no temporary image is left behind");
}

#[test]
fn the_demo_does_not_change_an_existing_file() {
    let installed = Installed::new();
    let image = installed.path().join("mine.img");
    let content: Vec<u8> = (0..1_048_576u32).flat_map(|word| word.to_le_bytes()).collect();
    fs::write(&image, &content).unwrap();
    fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).unwrap();
    let output = installed.run(&["demo", "--seconds", "0.1", "--json", "--blk-file", "mine.img"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(json(&output)["ways"].as_array().unwrap().iter().all(|way| way["verified_bytes"].as_u64().unwrap() > 0));
    assert_eq!(fs::read(&image).unwrap(), content);
}

#[test]
fn the_demo_removes_a_file_that_it_created() {
    let installed = Installed::new();
    let output = installed.run(&["demo", "--seconds", "0.1", "--blk-file", "new.img"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!installed.path().join("new.img").exists());
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("process-kick") && table.contains("Every byte verified."), "{table}");
}

#[test]
fn one_wrong_byte_makes_the_exit_status_non_zero() {
    let installed = Installed::new();
    let image = installed.path().join("changing.img");
    fs::write(&image, vec![7; 64 * 4096]).unwrap();
    let mut command =
        installed.command(MEMLOCK_KIB, &["demo", "--seconds", "1", "--json", "--blk-file", "changing.img"]);
    let mut demo = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Whenever the demo reads the content of the file, the content changes soon afterwards.
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    for byte in [8, 7].into_iter().cycle() {
        file.write_all_at(&[byte], 4096 * 31 + 1234).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        if demo.try_wait().unwrap().is_some() {
            break;
        }
    }
    let output = demo.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(json(&output)["ways"].as_array().unwrap().iter().any(|way| way["errors"].as_u64().unwrap() > 0));
}

#[test]
fn the_demo_skips_guests_that_cannot_be_pinned_and_states_the_remedy() {
    let installed = Installed::new();
    let output = installed.command(512, &["demo", "--seconds", "0.1", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "a demo without any guest shows nothing: {}", stderr(&output));
    let report = json(&output);
    let skipped = report["skipped"].as_array().unwrap();
    for skipped in skipped {
        let why = skipped["why"].as_str().unwrap();
        if why.contains("/dev/kvm") && skipped["name"].as_str().unwrap().starts_with("kvm-") {
            continue;
        }
        assert!(why.contains("pinning needs 1 MiB, RLIMIT_MEMLOCK is 512 KiB"), "{why}");
        assert!(why.contains("LimitMEMLOCK="), "{why}");
    }
    assert_eq!(skipped.len(), 6);
}

#[test]
fn the_demo_shows_exits_of_virtual_machines_or_why_it_skips_them() {
    let installed = Installed::new();
    // As the user who runs the tests, who may have access to KVM.
    let output = Command::new(&installed.program)
        .args(["demo", "--seconds", "0.5", "--json"])
        .env("TMPDIR", installed.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&output);
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        let skipped = report["skipped"].as_array().unwrap();
        let names: Vec<_> = skipped.iter().map(|skipped| skipped["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["kvm-poll", "kvm-irq", "kvm-kick"], "{error}");
        assert!(skipped.iter().all(|skipped| skipped["why"].as_str().unwrap().contains("/dev/kvm")), "{skipped:?}");
        return;
    }
    assert_eq!(report["skipped"], Value::Array(vec![]));
    let exits_per_io = |name: &str| {
        let ways = report["ways"].as_array().unwrap();
        let way = ways.iter().find(|way| way["name"] == name && way["depth"] == 1).unwrap();
        assert!(way["requested_exits_per_io"].as_f64().unwrap() <= way["exits_per_io"].as_f64().unwrap(), "{way}");
        way["exits_per_io"].as_f64().unwrap()
    };
    assert!(exits_per_io("kvm-kick") >= 1.0, "each doorbell is an exit");
    // On a busy machine the exits include the host's own interrupts.
    assert!(exits_per_io("kvm-poll") < 0.5, "polling needs no exits");
}

#[test]
fn bad_input_is_refused_with_a_reason_and_changes_no_file() {
    let installed = Installed::new();
    fs::write(installed.path().join("small.img"), [1; 8192]).unwrap();
    fs::write(installed.path().join("ragged.img"), vec![1; 300_000]).unwrap();
    let cases: [(&[&str], &str); 5] = [
        (&["demo", "--blk-file", "no/such/directory/image"], "cannot create no/such/directory/image: No such file"),
        (&["demo", "--blk-file", "."], "is a directory: a disk is a regular file or a block device"),
        (&["demo", "--blk-file", "small.img"], "small.img has 8192 bytes: the demo needs at least 262144"),
        (&["demo", "--blk-file", "ragged.img"], "ragged.img"),
        (&["demo", "--seconds", "0"], "must be a number from 0.1 to 3600"),
    ];
    for (arguments, message) in cases {
        let output = installed.run(arguments);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        assert!(stderr(&output).contains(message), "{arguments:?}: {}", stderr(&output));
    }
    assert_eq!(fs::read(installed.path().join("small.img")).unwrap(), [1; 8192]);
    assert_eq!(fs::metadata(installed.path().join("ragged.img")).unwrap().len(), 300_000);
}

#[test]
fn each_program_prints_its_own_name_and_version() {
    for (program, name) in [
        (env!("CARGO_BIN_EXE_ringpass"), "ringpass"),
        (env!("CARGO_BIN_EXE_vhost-user-ringpass"), "vhost-user-ringpass"),
    ] {
        let output = Command::new(program).arg("--version").output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{name} {}\n", env!("CARGO_PKG_VERSION")));
    }
}

#[test]
fn the_error_for_an_unknown_command_does_not_suggest_the_internal_command() {
    for word in ["bogus", "demo-gues", "demo-guest2"] {
        let output = Command::new(env!("CARGO_BIN_EXE_ringpass")).arg(word).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let text = stderr(&output);
        assert!(text.contains(&format!("'{word}'")) && !text.contains("'demo-guest'"), "{text}");
    }
}

#[test]
fn the_guest_command_without_a_broker_explains_itself() {
    let output = Command::new(env!("CARGO_BIN_EXE_ringpass")).arg("demo-guest").stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    assert!(stderr(&output).contains("started by `ringpass demo`"), "{}", stderr(&output));
}

#[test]
fn the_probe_tells_an_ordinary_user_that_direct_mode_is_available() {
    let installed = Installed::new();
    let output = installed.run(&["probe", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&output);
    let modes = report["modes"].as_array().unwrap();
    let available = |mode: &&Value| mode["available"] == true;
    assert_eq!(modes.iter().filter(available).count(), 3, "{report}");
    for mode in modes.iter().filter(|mode| mode["available"] == false) {
        assert!(mode["why"].as_str().unwrap().contains("does not have it yet"), "{mode}");
        assert!(mode["change"].as_array().unwrap().iter().any(Value::is_string), "{mode}");
    }
}
