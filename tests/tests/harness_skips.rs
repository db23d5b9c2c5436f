//! The harness itself: it counts a skipped test as skipped, and an error fails the test.
//!
//! Only this test program uses Rust's own harness: under ours, a fault that hides failures would hide the failures of
//! these tests too.

use std::{env, fs, process::Command};

use ringpass_tests::{
    harness::{NO_SKIP_VARIABLE, SKIP_LOG_VARIABLE, SOAK_SECONDS_VARIABLE, SOAK_VARIABLE},
    kernel_log,
};
use tempfile::TempDir;

/// The result of a run of the fixture.
struct Outcome {
    succeeded: bool,
    stdout: String,
    stderr: String,
    skip_log: String,
}

impl Outcome {
    #[track_caller]
    fn says(&self, text: &str) {
        assert!(self.stdout.contains(text), "no {text:?} in:\n{}\n{}", self.stdout, self.stderr);
    }
}

/// The kernel log that the fixture sees. It has an old warning that no test of the fixture caused.
const OLD_KERNEL_LOG: &str = "4,1,10,-;WARNING: CPU: 0 PID: 1 at some/old.c:1\n";

fn run_fixture(arguments: &[&str], variables: &[(&str, &str)]) -> Outcome {
    let directory = TempDir::new().expect("a temporary directory");
    let skip_log = directory.path().join("skips");
    let kernel_log = directory.path().join("kmsg");
    fs::write(&kernel_log, OLD_KERNEL_LOG).expect("a written file");
    let mut command = Command::new(env!("CARGO_BIN_EXE_harness_fixture"));
    for variable in ["CI", NO_SKIP_VARIABLE, SOAK_VARIABLE, SOAK_SECONDS_VARIABLE] {
        command.env_remove(variable);
    }
    let output = command
        .args(arguments)
        .env(SKIP_LOG_VARIABLE, &skip_log)
        .env(kernel_log::PATH_VARIABLE, &kernel_log)
        .envs(variables.iter().copied())
        .output()
        .expect("the fixture starts");
    Outcome {
        succeeded: output.status.success(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
        skip_log: fs::read_to_string(skip_log).unwrap_or_default(),
    }
}

const UNMET_REASON: &str = "needs a moon: there is none; wait for the night";

#[test]
fn a_test_runner_lists_an_unmet_test_as_ignored() {
    // These are the two calls of cargo-nextest, and the parts of their output that it reads.
    let all = run_fixture(&["--list", "--format", "terse"], &[]);
    let ignored = run_fixture(&["--list", "--format", "terse", "--ignored"], &[]);
    assert!(all.succeeded && ignored.succeeded);
    for name in ["met", "unmet", "unmet_off_main_path", "long", "error"] {
        assert!(all.stdout.lines().any(|line| line == format!("{name}: test")), "no {name} in:\n{}", all.stdout);
    }
    assert!(ignored.stdout == "unmet: test\nunmet_off_main_path: test\nlong: test\n", "{}", ignored.stdout);

    // The fixture records the reason when it lists its tests, because a test runner never starts an ignored test.
    let reasons = all.skip_log;
    assert!(reasons.contains(&format!("skipped\tharness_fixture::unmet\t{UNMET_REASON}\n")), "{reasons}");
    assert!(reasons.contains("skipped\tharness_fixture::long\ta long run: `cargo xtask soak` runs it\n"), "{reasons}");
    assert!(reasons.lines().count() == 3, "{reasons}");
}

#[test]
fn an_unmet_test_is_counted_as_skipped_with_its_reason() {
    let outcome = run_fixture(&["--exact", "unmet"], &[]);
    assert!(outcome.succeeded);
    outcome.says("0 passed; 0 failed; 1 ignored");
    assert!(outcome.stderr == format!("skipped unmet: {UNMET_REASON}\n"), "{}", outcome.stderr);
    run_fixture(&["--exact", "met"], &[]).says("1 passed; 0 failed; 0 ignored");
}

#[test]
fn an_unmet_test_fails_where_nothing_may_be_skipped() {
    for variable in [("CI", "true"), (NO_SKIP_VARIABLE, "1")] {
        let outcome = run_fixture(&["--exact", "unmet"], &[variable]);
        assert!(!outcome.succeeded, "{variable:?}");
        outcome.says(&format!("cannot run here: {UNMET_REASON}"));
        outcome.says("0 passed; 1 failed; 0 ignored");

        let listed = run_fixture(&["--list", "--format", "terse", "--ignored"], &[variable]);
        assert!(listed.stdout == "unmet_off_main_path: test\nlong: test\n", "{}", listed.stdout);
        assert!(listed.skip_log.contains("(may be skipped: few machines have one)"), "{}", listed.skip_log);
    }
    for off in [("CI", "false"), (NO_SKIP_VARIABLE, "0"), ("CI", "")] {
        run_fixture(&["--exact", "unmet"], &[off]).says("1 ignored");
    }
}

#[test]
fn an_unmet_test_fails_if_the_runner_runs_it() {
    for name in ["unmet", "long"] {
        let outcome = run_fixture(&["--include-ignored", "--exact", name], &[]);
        assert!(!outcome.succeeded, "{name} passed");
        outcome.says("cannot run here: ");
    }
}

#[test]
fn an_error_fails_the_test_with_its_causes() {
    let outcome = run_fixture(&["--exact", "error"], &[]);
    assert!(!outcome.succeeded);
    outcome.says("the outer error\n  because: the inner cause\n");
}

#[test]
fn a_panic_fails_the_test() {
    let outcome = run_fixture(&["--exact", "panic"], &[]);
    assert!(!outcome.succeeded);
    outcome.says("a broken expectation");
}

#[test]
fn a_kernel_warning_during_a_test_fails_it() {
    let outcome = run_fixture(&["--exact", "kernel_warning"], &[]);
    assert!(!outcome.succeeded);
    outcome.says("WARNING: CPU: 0 PID: 7 at a/new.c:9");
    assert!(!outcome.stdout.contains("some/old.c"), "an old warning was taken for a new one:\n{}", outcome.stdout);
    assert!(!outcome.stdout.contains("ordinary"), "{}", outcome.stdout);
    run_fixture(&["--exact", "met"], &[]).says("1 passed");
}

#[test]
fn an_unreadable_kernel_log_is_noted_and_fails_no_test() {
    let outcome = run_fixture(&["--exact", "met"], &[(kernel_log::PATH_VARIABLE, "/no/such/log")]);
    assert!(outcome.succeeded);
    let note =
        "note\tharness_fixture::met\tran without a look at the kernel log: No such file or directory (os error 2)\n";
    assert!(outcome.skip_log == note, "{}", outcome.skip_log);
}

#[test]
fn a_long_run_has_larger_budgets() {
    let budgets = |variables: &[(&str, &str)]| run_fixture(&["--exact", "budgets"], variables);
    budgets(&[]).says("count 5000 seconds 1\n");
    budgets(&[(SOAK_SECONDS_VARIABLE, "9")]).says("count 5000 seconds 1\n");
    budgets(&[(SOAK_VARIABLE, "1")]).says("count 100000 seconds 60\n");
    budgets(&[(SOAK_VARIABLE, "1"), (SOAK_SECONDS_VARIABLE, "9")]).says("count 100000 seconds 9\n");
    let wrong = budgets(&[(SOAK_VARIABLE, "1"), (SOAK_SECONDS_VARIABLE, "1h")]);
    assert!(!wrong.succeeded);
    wrong.says("RINGPASS_SOAK_SECONDS=\"1h\" is not a whole number of seconds");
    run_fixture(&["--exact", "long"], &[(SOAK_VARIABLE, "1")]).says("1 passed");
}

#[test]
fn the_harness_refuses_two_tests_with_the_same_name() {
    let outcome = run_fixture(&["--list", "--format", "terse"], &[("RINGPASS_FIXTURE_TWICE", "1")]);
    assert!(!outcome.succeeded);
    assert!(outcome.stderr.contains("two tests are called \"met\""), "{}", outcome.stderr);
}
