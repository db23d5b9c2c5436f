//! `cargo xtask repeat`: all tests several times in a row, on a machine that is idle or busy.
//!
//! A test that fails once in twenty runs has a bug, or shows one. This task finds such tests before they block an
//! unrelated change.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{packages, steps::Steps, test, test_run::TestRun};

/// The options for the rounds.
#[derive(Args)]
pub(crate) struct Options {
    /// Number of rounds. All of them run, even if one fails.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,
    /// Keep every CPU busy with a spinning thread during the rounds.
    #[arg(long)]
    under_load: bool,
}

/// Runs the rounds and counts the failed ones.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut steps = Steps::default();
    // Without a package its tests are skipped, and a round says nothing about them.
    steps.run("Debian packages", packages::install_all_missing)?;
    let mut failed_rounds = Vec::new();
    let result = with_load(options.under_load, || {
        for round in 1..=options.times {
            println!("\nround {round} of {}", options.times);
            let mut tests = TestRun::begin()?;
            let outcome = steps
                .run("tests", || tests.run(test::all_tests()))
                .and_then(|()| steps.run("kernel log", || tests.check_kernel_log()));
            tests.print_skipped()?;
            if let Err(error) = outcome {
                println!("\nround {round} failed: {error:#}");
                failed_rounds.push(round);
            }
        }
        Ok(())
    });
    steps.print_times();
    result?;
    conclude(options.times, &failed_rounds)
}

fn conclude(rounds: u32, failed_rounds: &[u32]) -> Result<()> {
    if failed_rounds.is_empty() {
        println!("\nAll {rounds} rounds passed.");
        return Ok(());
    }
    bail!("{} of {rounds} rounds failed: {failed_rounds:?}; see their output above for the tests", failed_rounds.len())
}

/// Runs `work`; with load, beside one spinning thread for each CPU.
fn with_load(is_loaded: bool, work: impl FnOnce() -> Result<()>) -> Result<()> {
    if !is_loaded {
        return work();
    }
    let cpus = thread::available_parallelism().context("cannot count the CPUs")?.get();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..cpus {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        // On drop, so that the threads end after a panic, too: the scope waits for them.
        let _end = OnDrop(|| is_over.store(true, Ordering::Relaxed));
        work()
    })
}

struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_names_the_failed_rounds() {
        assert!(conclude(5, &[]).is_ok());
        let error = conclude(5, &[2, 4]).expect_err("two rounds failed").to_string();
        assert!(error.starts_with("2 of 5 rounds failed: [2, 4]"), "{error}");
    }

    #[test]
    fn the_load_ends_with_the_work_even_if_the_work_fails() {
        for is_loaded in [false, true] {
            assert!(with_load(is_loaded, || Ok(())).is_ok());
            assert!(with_load(is_loaded, || bail!("it broke")).is_err());
        }
    }
}
