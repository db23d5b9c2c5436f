//! The harness tests itself: what is skipped is counted as skipped, and what is wrong fails.
//!
//! This program starts itself again with a made-up set of tests (the *fixture*) and reads what a test runner would read.

use std::{
    env,
    fs::{self, OpenOptions},
    io::Write,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_tests::{
    harness::{self, NO_SKIP_VARIABLE, SKIP_LOG_VARIABLE, SOAK_SECONDS_VARIABLE, SOAK_VARIABLE, Test, test},
    kernel_log,
    needs::Need,
};
use tempfile::TempDir;

/// Set in the process that is to be the fixture.
const FIXTURE_VARIABLE: &str = "RINGPASS_HARNESS_FIXTURE";

fn main() -> ExitCode {
    if env::var_os(FIXTURE_VARIABLE).is_some() {
        return harness::run(fixture());
    }
    harness::run(vec![
        test("a_test_runner_lists_an_unmet_test_as_ignored", [], a_test_runner_lists_an_unmet_test_as_ignored),
        test("an_unmet_test_is_counted_as_skipped_with_its_reason", [], an_unmet_test_is_counted_as_skipped),
        test("an_unmet_test_fails_where_nothing_may_be_skipped", [], an_unmet_test_fails_where_nothing_may_be_skipped),
        test("an_unmet_test_that_is_run_all_the_same_fails", [], an_unmet_test_that_is_run_all_the_same_fails),
        test("an_error_fails_the_test_with_its_causes", [], an_error_fails_the_test_with_its_causes),
        test("a_panic_fails_the_test", [], a_panic_fails_the_test),
        test("a_kernel_warning_during_a_test_fails_it", [], a_kernel_warning_during_a_test_fails_it),
        test("an_unreadable_kernel_log_is_said_and_no_failure", [], an_unreadable_kernel_log_is_said),
        test("a_long_run_takes_its_own_budgets", [], a_long_run_takes_its_own_budgets),
        test("two_tests_of_one_name_are_refused", [], two_tests_of_one_name_are_refused),
    ])
}

fn fixture() -> Vec<Test> {
    let no_moon = || Need::new("a moon", || bail!("there is none; wait for the night"));
    let mut tests = vec![
        test("met", [Need::cpus(1)], || Ok(())),
        test("unmet", [Need::cpus(1), no_moon()], || Ok(())),
        test("unmet_off_main_path", [no_moon()], || Ok(())).off_main_path("few machines have one"),
        test("long", [], || Ok(())).soak_only(),
        test("budgets", [], || {
            let time = harness::time_budget(std::time::Duration::from_secs(1), std::time::Duration::from_secs(60));
            println!("count {} seconds {}", harness::budget(5_000, 100_000), time.as_secs());
            Ok(())
        }),
        test("error", [], || Err(anyhow::anyhow!("the inner cause")).context("the outer error")),
        test("panic", [], || panic!("a broken expectation")),
        test("kernel_warning", [], || {
            let path = env::var_os(kernel_log::PATH_VARIABLE).context("no kernel log to write to")?;
            let mut log = OpenOptions::new().append(true).open(path)?;
            log.write_all(b"6,2,20,-;loop0: an ordinary message\n4,3,30,-;WARNING: CPU: 0 PID: 7 at a/new.c:9\n")?;
            Ok(())
        }),
    ];
    if env::var_os(FIXTURE_VARIABLE).is_some_and(|kind| kind == "twice") {
        tests.push(test("met", [], || Ok(())));
    }
    tests
}

/// What a run of the fixture left behind.
struct Outcome {
    succeeded: bool,
    stdout: String,
    stderr: String,
    skip_log: String,
}

impl Outcome {
    fn has_summary(&self, summary: &str) -> Result<()> {
        ensure!(self.stdout.contains(summary), "no {summary:?} in:\n{}\n{}", self.stdout, self.stderr);
        Ok(())
    }
}

/// The kernel log that the fixture sees: old trouble, which no test of the fixture caused.
const OLD_KERNEL_LOG: &str = "4,1,10,-;WARNING: CPU: 0 PID: 1 at some/old.c:1\n";

fn run_fixture(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Outcome> {
    let directory = TempDir::new()?;
    let skip_log = directory.path().join("skips");
    let kernel_log = directory.path().join("kmsg");
    fs::write(&kernel_log, OLD_KERNEL_LOG)?;
    let mut command = Command::new(env::current_exe()?);
    for variable in ["CI", NO_SKIP_VARIABLE, SOAK_VARIABLE, SOAK_SECONDS_VARIABLE] {
        command.env_remove(variable);
    }
    let output = command
        .args(arguments)
        .env(FIXTURE_VARIABLE, "once")
        .env(SKIP_LOG_VARIABLE, &skip_log)
        .env(kernel_log::PATH_VARIABLE, &kernel_log)
        .envs(variables.iter().copied())
        .output()?;
    Ok(Outcome {
        succeeded: output.status.success(),
        stdout: String::from_utf8(output.stdout)?,
        stderr: String::from_utf8(output.stderr)?,
        skip_log: fs::read_to_string(skip_log).unwrap_or_default(),
    })
}

const UNMET_REASON: &str = "needs a moon: there is none; wait for the night";

fn a_test_runner_lists_an_unmet_test_as_ignored() -> Result<()> {
    // The two calls that cargo-nextest makes, and what it reads from them.
    let all = run_fixture(&["--list", "--format", "terse"], &[])?;
    let ignored = run_fixture(&["--list", "--format", "terse", "--ignored"], &[])?;
    ensure!(all.succeeded && ignored.succeeded);
    for name in ["met", "unmet", "unmet_off_main_path", "long", "error"] {
        ensure!(all.stdout.lines().any(|line| line == format!("{name}: test")), "no {name} in:\n{}", all.stdout);
    }
    ensure!(ignored.stdout == "unmet: test\nunmet_off_main_path: test\nlong: test\n", "{}", ignored.stdout);

    // Listing is when the reason becomes known: a test runner never starts an ignored test.
    let reasons = all.skip_log;
    ensure!(reasons.contains(&format!("skipped\tharness_skips::unmet\t{UNMET_REASON}\n")), "{reasons}");
    ensure!(reasons.contains("skipped\tharness_skips::long\ta long run: `cargo xtask soak` runs it\n"), "{reasons}");
    ensure!(reasons.lines().count() == 3, "{reasons}");
    Ok(())
}

fn an_unmet_test_is_counted_as_skipped() -> Result<()> {
    let outcome = run_fixture(&["--exact", "unmet"], &[])?;
    ensure!(outcome.succeeded);
    outcome.has_summary("0 passed; 0 failed; 1 ignored")?;
    ensure!(outcome.stderr == format!("skipped unmet: {UNMET_REASON}\n"), "{}", outcome.stderr);
    run_fixture(&["--exact", "met"], &[])?.has_summary("1 passed; 0 failed; 0 ignored")
}

fn an_unmet_test_fails_where_nothing_may_be_skipped() -> Result<()> {
    for variable in [("CI", "true"), (NO_SKIP_VARIABLE, "1")] {
        let outcome = run_fixture(&["--exact", "unmet"], &[variable])?;
        ensure!(!outcome.succeeded, "{variable:?}");
        outcome.has_summary(&format!("cannot run here: {UNMET_REASON}"))?;
        outcome.has_summary("0 passed; 1 failed; 0 ignored")?;

        let listed = run_fixture(&["--list", "--format", "terse", "--ignored"], &[variable])?;
        ensure!(listed.stdout == "unmet_off_main_path: test\nlong: test\n", "{}", listed.stdout);
        ensure!(listed.skip_log.contains("(may be skipped: few machines have one)"), "{}", listed.skip_log);
    }
    for off in [("CI", "false"), (NO_SKIP_VARIABLE, "0"), ("CI", "")] {
        run_fixture(&["--exact", "unmet"], &[off])?.has_summary("1 ignored")?;
    }
    Ok(())
}

fn an_unmet_test_that_is_run_all_the_same_fails() -> Result<()> {
    for name in ["unmet", "long"] {
        let outcome = run_fixture(&["--include-ignored", "--exact", name], &[])?;
        ensure!(!outcome.succeeded, "{name} passed");
        outcome.has_summary("cannot run here: ")?;
    }
    Ok(())
}

fn an_error_fails_the_test_with_its_causes() -> Result<()> {
    let outcome = run_fixture(&["--exact", "error"], &[])?;
    ensure!(!outcome.succeeded);
    outcome.has_summary("the outer error\n  because: the inner cause\n")
}

fn a_panic_fails_the_test() -> Result<()> {
    let outcome = run_fixture(&["--exact", "panic"], &[])?;
    ensure!(!outcome.succeeded);
    outcome.has_summary("a broken expectation")
}

fn a_kernel_warning_during_a_test_fails_it() -> Result<()> {
    let outcome = run_fixture(&["--exact", "kernel_warning"], &[])?;
    ensure!(!outcome.succeeded);
    outcome.has_summary("WARNING: CPU: 0 PID: 7 at a/new.c:9")?;
    ensure!(!outcome.stdout.contains("some/old.c"), "an old warning was taken for a new one:\n{}", outcome.stdout);
    ensure!(!outcome.stdout.contains("ordinary"), "{}", outcome.stdout);
    run_fixture(&["--exact", "met"], &[])?.has_summary("1 passed")
}

fn an_unreadable_kernel_log_is_said() -> Result<()> {
    let outcome = run_fixture(&["--exact", "met"], &[(kernel_log::PATH_VARIABLE, "/no/such/log")])?;
    ensure!(outcome.succeeded);
    let note =
        "note\tharness_skips::met\tran without a look at the kernel log: No such file or directory (os error 2)\n";
    ensure!(outcome.skip_log == note, "{}", outcome.skip_log);
    Ok(())
}

fn a_long_run_takes_its_own_budgets() -> Result<()> {
    let budgets = |variables: &[(&str, &str)]| run_fixture(&["--exact", "budgets"], variables);
    budgets(&[])?.has_summary("count 5000 seconds 1\n")?;
    budgets(&[(SOAK_SECONDS_VARIABLE, "9")])?.has_summary("count 5000 seconds 1\n")?;
    budgets(&[(SOAK_VARIABLE, "1")])?.has_summary("count 100000 seconds 60\n")?;
    budgets(&[(SOAK_VARIABLE, "1"), (SOAK_SECONDS_VARIABLE, "9")])?.has_summary("count 100000 seconds 9\n")?;
    let wrong = budgets(&[(SOAK_VARIABLE, "1"), (SOAK_SECONDS_VARIABLE, "1h")])?;
    ensure!(!wrong.succeeded);
    wrong.has_summary("RINGPASS_SOAK_SECONDS=\"1h\" is not a whole number of seconds")?;
    run_fixture(&["--exact", "long"], &[(SOAK_VARIABLE, "1")])?.has_summary("1 passed")
}

fn two_tests_of_one_name_are_refused() -> Result<()> {
    let outcome = run_fixture(&["--list", "--format", "terse"], &[(FIXTURE_VARIABLE, "twice")])?;
    ensure!(!outcome.succeeded);
    ensure!(outcome.stderr.contains("two tests are called \"met\""), "{}", outcome.stderr);
    Ok(())
}
