//! `ringpass policy` as users and their CI use it.

use std::{
    fs,
    io::Write,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

/// Policy files in their own directory.
struct Files(TempDir);

const OPEN: &str = "\
version = 1
[sqe]
operations = [\"IORING_OP_READ_FIXED\", \"IORING_OP_OPENAT\"]
flags_required = []
flags_allowed = [\"IOSQE_FIXED_FILE\"]
[register]
operations = [\"IORING_REGISTER_EVENTFD\"]
";

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn with(self, name: &str, text: &str) -> Self {
        fs::write(self.0.path().join(name), text).unwrap();
        self
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_ringpass")).args(arguments).current_dir(self.0.path()).output().unwrap()
    }

    fn policy(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = self.run(&[&["policy"], arguments].concat());
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    }

    fn json(&self, arguments: &[&str]) -> (i32, Value) {
        let (status, out, err) = self.policy(&[arguments, &["--json"]].concat());
        (status, serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}")))
    }
}

const BUILT_IN: [&str; 4] = ["direct-read-write", "direct-read-only", "mediated-read-write", "mediated-read-only"];

#[test]
fn the_built_in_policies_pass_lint_for_any_kernel_and_for_this_one() {
    let files = Files::new();
    for name in BUILT_IN {
        for kernel in [&[][..], &["--kernel", "running"], &["--kernel", "6.12"], &["--kernel", "7.0.10"]] {
            let (status, out, err) = files.policy(&[&["lint", name], kernel].concat());
            assert_eq!(status, 0, "{out}{err}");
            assert!(out.contains(": 0 errors, "), "{out}");
        }
    }
    let (status, out, _) = files.policy(&["lint", "direct-read-write", "--strict"]);
    assert_eq!(status, 1, "a warning counts: {out}");
    let (_, out, _) = files.policy(&["list"]);
    assert_eq!(out.lines().map(|line| line.split(' ').next().unwrap()).collect::<Vec<_>>(), BUILT_IN);
}

#[test]
fn lint_names_each_way_to_escape_and_exits_with_1() {
    let files = Files::new().with("open.toml", OPEN);
    let (status, out, _) = files.policy(&["lint", "open.toml"]);
    assert_eq!(status, 1);
    for line in [
        "error[no-fixed-file]: IORING_OP_READ_FIXED: the file may be any descriptor",
        "error[files-outside-table]: IORING_OP_OPENAT: lets the guest open any file that the owner may open",
        "error[raw-addresses]: IORING_OP_OPENAT",
        "open.toml for direct mode on any kernel: ",
    ] {
        assert!(out.contains(line), "{line}\n{out}");
    }
    let (status, report) = files.json(&["lint", "open.toml"]);
    assert_eq!((status, &report["mode"], &report["compile_error"]), (1, &Value::from("direct"), &Value::Null));
    let findings = report["findings"].as_array().unwrap();
    let errors = findings.iter().filter(|finding| finding["severity"] == "error").count();
    assert_eq!(report["errors"], errors);
    assert!(findings.iter().all(|f| ["lint", "subject", "what", "why"].iter().all(|key| f[key].is_string())));
}

#[test]
fn a_policy_that_a_kernel_cannot_enforce_is_an_error_for_that_kernel() {
    let files = Files::new().with("new.toml", &OPEN.replace("OPENAT", "PIPE"));
    let (status, report) = files.json(&["lint", "new.toml", "--kernel", "6.12"]);
    assert_eq!(status, 1);
    assert!(
        report["compile_error"]
            .as_str()
            .unwrap()
            .starts_with("this kernel does not know IORING_OP_PIPE: use Linux 6.16 or")
    );
    let (status, report) = files.json(&["lint", "mediated-read-only", "--mode", "direct", "--kernel", "6.18"]);
    assert_eq!(status, 1);
    let refusal = report["compile_error"].as_str().unwrap();
    assert!(refusal.contains("fields.file_slots") && refusal.contains("this policy is for mediated mode"), "{refusal}");
}

#[test]
fn lint_judges_nop_by_the_target_kernel() {
    let files = Files::new().with("nop.toml", &OPEN.replace("OPENAT", "NOP").replace("[]", "[\"IOSQE_FIXED_FILE\"]"));
    for (kernel, severity) in [("6.18.38", "error"), ("6.18.39", "warning"), ("6.12.3", "warning")] {
        let (_, report) = files.json(&["lint", "nop.toml", "--kernel", kernel]);
        let findings = report["findings"].as_array().unwrap();
        let nop = findings.iter().find(|finding| finding["lint"] == "nop").unwrap();
        assert_eq!(nop["severity"], severity, "{kernel}");
    }
}

#[test]
fn lint_reports_what_hangs_a_ring_or_exhausts_the_host_until_the_policy_accepts_it() {
    let text = OPEN
        .replace("OPENAT", "FSYNC\", \"IORING_OP_ASYNC_CANCEL")
        .replace("[]", "[\"IOSQE_FIXED_FILE\"]")
        .replace("flags_allowed = [", "flags_allowed = [\"IOSQE_IO_DRAIN\", \"IOSQE_IO_LINK\", ");
    let accept = "[lint]\naccept = [\"ordered-requests\", \"unbounded-work\", \"completion-flood\"]\n";
    let files = Files::new().with("strict.toml", &text).with("lax.toml", &format!("{text}{accept}"));
    let findings = [
        "[unbounded-work]: IORING_OP_FSYNC: lets the guest flush files, in any number: a request waits for a worker thread",
        "[completion-flood]: IORING_OP_ASYNC_CANCEL: lets the guest cancel requests of the same ring, as fast as it likes",
        "[ordered-requests]: IOSQE_IO_DRAIN: lets the guest hang its own ring",
        "[ordered-requests]: IOSQE_IO_LINK: lets the guest hang its own ring",
    ];
    let (status, out, _) = files.policy(&["lint", "strict.toml"]);
    assert_eq!(status, 1);
    for finding in findings {
        assert!(out.contains(&format!("error{finding}")), "{finding}\n{out}");
    }
    let (status, out, _) = files.policy(&["lint", "lax.toml"]);
    assert_eq!(status, 0, "{out}");
    for finding in findings {
        assert!(out.contains(&format!("warning{finding}")), "{finding}\n{out}");
    }
    assert!(out.contains(" (the policy accepts this error)\n"), "{out}");
    assert_eq!(files.policy(&["lint", "lax.toml", "--strict"]).0, 1);
    let (_, report) = files.json(&["lint", "lax.toml"]);
    let accepted = report["findings"].as_array().unwrap().iter().filter(|finding| finding["accepted"] == true).count();
    assert_eq!((accepted, &report["errors"]), (findings.len(), &Value::from(0)));
    let (_, out, _) = files.policy(&["show", "lax.toml"]);
    for line in [
        "Any number of requests can wait for worker threads of the kernel: IORING_OP_FSYNC.",
        "hang its own ring: IOSQE_IO_DRAIN + IOSQE_IO_LINK.",
        "The policy accepts these errors of lint: ordered-requests, unbounded-work, completion-flood.",
    ] {
        assert!(out.contains(line), "{line}\n{out}");
    }
}

#[test]
fn a_policy_file_cannot_accept_that_a_guest_escapes() {
    let files = Files::new().with("open.toml", &format!("{OPEN}[lint]\naccept = [\"files-outside-table\"]\n"));
    let (status, _, err) = files.policy(&["lint", "open.toml"]);
    assert_eq!(status, 2);
    assert!(err.contains("\"files-outside-table\" is no known acceptable lint error"), "{err}");
}

#[test]
fn show_describes_what_a_guest_can_do_and_prints_the_file() {
    let files = Files::new().with("open.toml", OPEN);
    let (status, out, _) = files.policy(&["show", "open.toml"]);
    assert_eq!(status, 0);
    assert!(out.contains("  - open any file that the owner may open (IORING_OP_OPENAT)"), "{out}");
    let (_, toml, _) = files.policy(&["show", "direct-read-only", "--toml"]);
    let files = files.with("copy.toml", &toml);
    assert_eq!(files.policy(&["diff", "direct-read-only", "copy.toml"]), (0, String::new(), String::new()));
    let (status, shown) = files.json(&["show", "open.toml"]);
    assert_eq!((status, &shown["operations"][1]["operation"]), (0, &Value::from("IORING_OP_OPENAT")));
}

#[test]
fn diff_exits_with_1_if_the_policies_differ() {
    let files = Files::new().with("open.toml", OPEN);
    let (status, out, _) = files.policy(&["diff", "direct-read-only", "direct-read-write"]);
    assert_eq!((status, out.as_str()), (1, "+ SQEs may request IORING_OP_WRITE_FIXED\n"));
    let (status, report) = files.json(&["diff", "direct-read-only", "open.toml"]);
    assert_eq!((status, &report["differences"][0]["effect"]), (1, &Value::from("widens")));
}

#[test]
fn a_bad_policy_file_exits_with_2_and_the_error_states_the_position() {
    let files = Files::new().with("bad.toml", &OPEN.replace("READ_FIXED", "READ_FIXD"));
    for arguments in [["lint", "bad.toml"].as_slice(), &["show", "bad.toml"], &["diff", "bad.toml", "direct-read-only"]]
    {
        let (status, out, err) = files.policy(arguments);
        assert_eq!((status, out.as_str()), (2, ""), "{err}");
        assert!(
            err.contains("bad.toml: line 3, column 15: \"IORING_OP_READ_FIXD\" is no known SQE operation"),
            "{err}"
        );
    }
    let (status, _, err) = files.policy(&["show", "none"]);
    assert!(status == 2 && err.contains("Built-in policies are direct-read-write, direct-read-only"), "{err}");
    let (status, _, err) = files.policy(&["lint", "direct-read-only", "--kernel", "new"]);
    assert!(status == 2 && err.contains("\"new\" is no kernel release"), "{err}");
}

#[test]
fn the_demo_refuses_a_policy_with_lint_errors_without_allow_unsafe_policy() {
    // The policy allows everything that the demo needs, and a way to escape.
    let text = OPEN.replace("IORING_OP_OPENAT", "IORING_OP_WRITE_FIXED").replace(
        "\"IORING_REGISTER_EVENTFD\"",
        "\"IORING_REGISTER_EVENTFD\", \"IORING_UNREGISTER_EVENTFD\", \"IORING_REGISTER_BUFFERS_UPDATE\"",
    );
    let files = Files::new().with("unsafe.toml", &text);
    let demo = ["demo", "--json", "--seconds", "0.1", "--policy", "unsafe.toml"];
    let why = |output: &Output| -> Vec<String> {
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let skipped = report["skipped"].as_array().unwrap().iter();
        skipped.map(|skipped| skipped["why"].as_str().unwrap().to_owned()).collect()
    };
    let refused = files.run(&demo);
    assert!(!refused.status.success());
    let reasons = why(&refused);
    assert!(reasons.iter().any(|why| why.contains("IORING_OP_READ_FIXED (no-fixed-file)")), "{reasons:?}");
    let taken = files.run(&[demo.as_slice(), &["--allow-unsafe-policy"]].concat());
    assert!(taken.status.success(), "{}", String::from_utf8_lossy(&taken.stderr));
    assert!(why(&taken).iter().all(|why| !why.contains("lint")), "{:?}", why(&taken));
}

#[test]
fn text_of_a_policy_file_cannot_control_the_terminal_or_add_lines() {
    let header = "name = \"evil\\u001b[2J\\nname\"\ndescription = \"\\u009b1mred\"\n";
    let files = Files::new().with("evil.toml", &format!("{header}{OPEN}"));
    let (status, out, err) = files.policy(&["show", "evil.toml"]);
    assert_eq!(status, 0, "{err}");
    assert_eq!(out.lines().next().unwrap(), r"evil\u{1b}[2J\nname: \u{9b}1mred");
    let files = files.with("key.toml", "\"a\\u001b[2J\" = 1\n").with("a\u{1b}[2J.toml", OPEN);
    for arguments in [["lint", "key.toml"], ["lint", "a\u{1b}[2J.toml"], ["show", "no\u{1b}[2J"]] {
        let (_, out, err) = files.policy(&arguments);
        assert!(!out.contains('\u{1b}') && !err.contains('\u{1b}'), "{arguments:?}: {out:?} {err:?}");
    }
}

#[test]
fn a_policy_is_read_from_a_pipe_up_to_a_limit() {
    let files = Files::new().with("large.toml", &format!("# {}\n{OPEN}", "x".repeat(1 << 20)));
    for endless in ["/dev/zero", "large.toml"] {
        let (status, _, err) = files.policy(&["lint", endless]);
        assert_eq!(status, 2);
        assert!(err.contains(endless) && err.contains("more than 256 KiB"), "{err}");
    }
    let (status, _, err) = files.policy(&["lint", "."]);
    assert!(status == 2 && err.contains("Is a directory"), "{err}");

    let mut lint = Command::new(env!("CARGO_BIN_EXE_ringpass"));
    lint.args(["policy", "lint", "/dev/stdin"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut lint = lint.spawn().unwrap();
    lint.stdin.take().unwrap().write_all(OPEN.as_bytes()).unwrap();
    let output = lint.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
}
