//! `cargo xtask test`: all checks that must pass before a change is accepted.

use std::process::Command;

use anyhow::Result;

use crate::{
    fuzz, module_circles, packages, publish,
    steps::{self, Steps, cargo},
    test_run::TestRun,
};

/// Time limit of a whole run with `cargo test`, which has no watchdog of its own.
const PLAIN_RUN_LIMIT: &str = "60m";
/// A short run; `cargo xtask soak fuzz` runs for longer.
const FUZZ_BUDGET: fuzz::Budget = fuzz::Budget { seconds: 15, seed: None, keeps_corpus: false };

/// Runs every step. The first step that fails ends the task.
pub(crate) fn run() -> Result<()> {
    let mut steps = Steps::default();
    let result = run_steps(&mut steps);
    steps.print_times();
    result?;
    println!("\nEverything passed.");
    Ok(())
}

fn run_steps(steps: &mut Steps) -> Result<()> {
    steps.run("Debian packages", packages::install_all_missing)?;
    steps.run("format", || steps::run(&mut cargo(&["fmt", "--all", "--check"])))?;
    steps.run("format of the fuzz targets", || {
        steps::run(&mut cargo(&["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))
    })?;
    steps.run("circles of modules", module_circles::run)?;
    steps.run("lint", || {
        steps::run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--keep-going", "--", "-D", "warnings"]))
    })?;
    // A build script builds the bare-metal program, because it is for no operating system; the workspace's features
    // omit it.
    steps.run("lint of the bare-metal program", || steps::run(&mut lint_bare_metal()))?;
    // Twice, because with private items rustdoc accepts links from public to private items, which are dead in the
    // published pages.
    steps.run("documentation", || document(&[]))?;
    steps.run("documentation of private items", || document(&["--document-private-items"]))?;
    steps.run("crates by themselves", publish::check_alone)?;
    steps.run("packaging", publish::package)?;

    let mut tests = TestRun::begin()?;
    let skip = |name, reason: &str| {
        println!("skipped: {reason}");
        tests.skip(name, reason)
    };
    steps.run("cargo publish --dry-run", || publish::dry_run(|reason| skip("cargo publish --dry-run", reason)))?;
    steps.run("public interfaces", || publish::check_semver(|reason| skip("public interfaces", reason)))?;
    let result = steps
        .run("tests", || tests.run(all_tests()))
        .and_then(|()| steps.run("examples in the documentation", || tests.run(doctests())))
        .and_then(|()| steps.run("kernel log", || tests.check_kernel_log()))
        .and_then(|()| steps.run("fuzzing", || fuzz::run(&tests, &FUZZ_BUDGET)));
    tests.print_skipped()?;
    result
}

fn document(options: &[&str]) -> Result<()> {
    steps::run(
        cargo(&["doc", "--workspace", "--no-deps", "--keep-going"]).args(options).env("RUSTDOCFLAGS", "-D warnings"),
    )
}

fn lint_bare_metal() -> Command {
    let program = ["--package", "ringpass-bare-metal", "--bin", "ringpass-bare-metal", "--features", "image"];
    let mut command = cargo(&["clippy"]);
    command.args(program).args(["--profile", "bare-metal", "--", "-D", "warnings"]);
    command
}

/// The command for all tests except the examples in the documentation.
pub(crate) fn all_tests() -> Command {
    if steps::has_nextest() {
        return nextest();
    }
    println!("cargo-nextest is not installed: the tests run one program after the other");
    plain()
}

fn nextest() -> Command {
    cargo(&["nextest", "run", "--workspace"])
}

/// All tests with `cargo test`, except the benchmarks (which `--all-targets` would run) and the examples in the
/// documentation.
fn plain() -> Command {
    let mut command = Command::new("timeout");
    let cargo = cargo(&["test", "--workspace", "--no-fail-fast", "--lib", "--bins", "--tests", "--examples"]);
    command.args(["--kill-after=30s", PLAIN_RUN_LIMIT]).arg(cargo.get_program()).args(cargo.get_args());
    command
}

fn doctests() -> Command {
    cargo(&["test", "--workspace", "--doc"])
}
