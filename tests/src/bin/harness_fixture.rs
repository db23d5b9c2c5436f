//! A made-up set of tests for the harness's own tests (`tests/harness_skips.rs`). They start this program and read what
//! a test runner would read. It is no test program itself: some of its tests must fail.

use std::{env, fs::OpenOptions, io::Write, process::ExitCode, time::Duration};

use anyhow::{Context, anyhow, bail};
use ringpass_tests::{
    harness::{self, test},
    kernel_log,
    needs::Need,
};

fn main() -> ExitCode {
    let no_moon = || Need::new("a moon", || bail!("there is none; wait for the night"));
    let mut tests = vec![
        test("met", [Need::cpus(1)], || Ok(())),
        test("unmet", [Need::cpus(1), no_moon()], || Ok(())),
        test("unmet_off_main_path", [no_moon()], || Ok(())).off_main_path("few machines have one"),
        test("long", [], || Ok(())).soak_only(),
        test("budgets", [], || {
            let time = harness::time_budget(Duration::from_secs(1), Duration::from_secs(60));
            println!("count {} seconds {}", harness::budget(5_000, 100_000), time.as_secs());
            Ok(())
        }),
        test("error", [], || Err(anyhow!("the inner cause")).context("the outer error")),
        test("panic", [], || panic!("a broken expectation")),
        test("kernel_warning", [], || {
            let path = env::var_os(kernel_log::PATH_VARIABLE).context("no kernel log to write to")?;
            let mut log = OpenOptions::new().append(true).open(path)?;
            log.write_all(b"6,2,20,-;loop0: an ordinary message\n4,3,30,-;WARNING: CPU: 0 PID: 7 at a/new.c:9\n")?;
            Ok(())
        }),
    ];
    if env::var_os("RINGPASS_FIXTURE_TWICE").is_some() {
        tests.push(test("met", [], || Ok(())));
    }
    harness::run(tests)
}
