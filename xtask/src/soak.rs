//! `cargo xtask soak`: the tests with the budgets of a long run, and the tests that run only in a soak.

use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{
    fuzz, quiet,
    steps::{self, Steps, cargo},
    test_run::TestRun,
};

/// The options of a soak.
#[derive(Args)]
pub(crate) struct Options {
    /// The soak to run, or `all`. Without a name: list the soaks.
    name: Option<String>,
    /// The time for each test with a time budget, instead of its own budget.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
    /// The seed of all random choices, decimal or 0x hexadecimal, as a failed test printed it.
    #[arg(long, value_parser = parse_seed)]
    seed: Option<u64>,
}

/// A long run. Add an entry to [`SOAKS`] for a new one.
struct Soak {
    name: &'static str,
    /// The purpose.
    what: &'static str,
    /// The approximate duration on a machine with two CPUs.
    duration: &'static str,
    work: Work,
}

enum Work {
    /// Tests, with the budgets of a long run.
    Tests {
        /// The tests, as a filter of cargo-nextest (<https://nexte.st/docs/filtersets/>).
        filter: &'static str,
        /// The number of cases of each property test (`PROPTEST_CASES`); `None`: proptest's default, 256.
        property_cases: Option<u32>,
    },
    /// The fuzz targets.
    Fuzz,
    /// The demo's own measurements, which are valid only while nothing else runs.
    Quiet,
}

const SOAKS: &[Soak] = &[
    Soak {
        name: "end-to-end",
        what: "every end-to-end test with its soak budget, and the tests that run only in a soak",
        duration: "an hour and more",
        work: Work::Tests { filter: "package(ringpass-tests) & kind(test)", property_cases: None },
    },
    Soak {
        name: "rings",
        what: "hostile drivers on a broker's socket for 20 minutes; restarts, disconnects, and changes while rings run",
        duration: "half an hour",
        work: Work::Tests { filter: "package(ringpass-tests) & binary(/^attach_/)", property_cases: None },
    },
    Soak {
        name: "policies",
        what: "100 million SQEs on the kernel and in the checker, 5 million attempts to escape from each policy, and guests \
               with other kernels",
        duration: "half an hour",
        work: Work::Tests { filter: "package(ringpass-tests) & binary(/^policy_/)", property_cases: None },
    },
    Soak {
        name: "properties",
        what: "the unit and property tests of all crates, 20 000 cases of each property",
        duration: "minutes",
        work: Work::Tests { filter: "not (package(ringpass-tests) & kind(test))", property_cases: Some(20_000) },
    },
    Soak {
        name: "fuzz",
        what: "the fuzz targets, ten minutes each, starting from earlier findings; a finding prints how to replay it",
        duration: "an hour",
        work: Work::Fuzz,
    },
    Soak {
        name: "quiet",
        what: "the demo: polling guests are within 5 % of the host, without VM exits; on a machine that does nothing else",
        duration: "minutes",
        work: Work::Quiet,
    },
];

/// The time for each fuzz target.
const FUZZ_SECONDS: u64 = 600;

const ALL: &str = "all";

/// Lists the soaks, or runs the named one.
pub(crate) fn run(options: &Options) -> Result<()> {
    let Some(name) = &options.name else {
        print_list();
        return Ok(());
    };
    let chosen = choose(name)?;
    // cargo-nextest provides the watchdog, the order and the selection of tests of a long run.
    if !steps::has_nextest() {
        bail!("a soak needs cargo-nextest: install it, see https://nexte.st/docs/installation/");
    }
    let mut steps = Steps::default();
    let result = run_each(&mut steps, &chosen, options);
    steps.print_times();
    result
}

fn print_list() {
    println!("Long runs, each with `cargo xtask soak NAME [--seconds N] [--seed SEED]`:\n");
    for soak in SOAKS {
        println!("  {:<14}{} ({})", soak.name, soak.what, soak.duration);
    }
    println!("  {ALL:<14}all of these, one after the other");
}

fn choose(name: &str) -> Result<Vec<&'static Soak>> {
    if name == ALL {
        return Ok(SOAKS.iter().collect());
    }
    let soak = SOAKS.iter().find(|soak| soak.name == name).with_context(|| {
        let names: Vec<&str> = SOAKS.iter().map(|soak| soak.name).collect();
        format!("no soak is called {name:?}: choose one of {} and {ALL}", names.join(", "))
    })?;
    Ok(vec![soak])
}

fn run_each(steps: &mut Steps, soaks: &[&'static Soak], options: &Options) -> Result<()> {
    for soak in soaks {
        let mut tests = TestRun::begin()?;
        println!("{}: {} ({})", soak.name, soak.what, soak.duration);
        let result = steps
            .run(soak.name, || match &soak.work {
                Work::Tests { filter, property_cases } => tests.run(command(filter, *property_cases, options)),
                Work::Fuzz => run_fuzz(&tests, options),
                Work::Quiet => quiet::run(options.seconds),
            })
            .and_then(|()| steps.run("kernel log", || tests.check_kernel_log()));
        tests.print_skipped()?;
        result?;
    }
    Ok(())
}

fn run_fuzz(tests: &TestRun, options: &Options) -> Result<()> {
    tests.run(cargo(fuzz::SAVE_SEEDS))?;
    let seconds = options.seconds.unwrap_or(FUZZ_SECONDS);
    fuzz::run(tests, &fuzz::Budget { seconds, seed: options.seed, keeps_corpus: true })
}

fn command(filter: &str, property_cases: Option<u32>, options: &Options) -> Command {
    let mut command = cargo(&["nextest", "run", "--workspace", "--profile", "soak", "--filterset", filter]);
    command.env("RINGPASS_SOAK", "1");
    if let Some(seconds) = options.seconds {
        command.env("RINGPASS_SOAK_SECONDS", seconds.to_string());
    }
    if let Some(seed) = options.seed {
        command.env("RINGPASS_SEED", format!("{seed:#x}")).env("PROPTEST_RNG_SEED", seed.to_string());
    }
    if let Some(cases) = property_cases {
        command.env("PROPTEST_CASES", cases.to_string());
    }
    command
}

fn parse_seed(text: &str) -> Result<u64, String> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .map_err(|error| format!("must be a number below 2^64, decimal or 0x hexadecimal: {error}"))
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, ffi::OsStr};

    use super::*;

    #[test]
    fn the_error_for_an_unknown_soak_lists_the_names() {
        assert_eq!(choose("properties").expect("a known name")[0].name, "properties");
        assert_eq!(choose("all").expect("all").len(), SOAKS.len());
        let refusal = choose("night").err().expect("an unknown name").to_string();
        assert_eq!(
            refusal,
            "no soak is called \"night\": choose one of end-to-end, rings, policies, properties, fuzz, quiet and all"
        );
    }

    #[test]
    fn the_options_reach_the_tests() {
        let options = Options { name: None, seconds: Some(90), seed: Some(0x2a) };
        let command = command("all()", Some(20_000), &options);
        let variables: HashMap<_, _> = command.get_envs().map(|(name, value)| (name, value.expect("set"))).collect();
        for (name, value) in [
            ("RINGPASS_SOAK", "1"),
            ("RINGPASS_SOAK_SECONDS", "90"),
            ("RINGPASS_SEED", "0x2a"),
            ("PROPTEST_RNG_SEED", "42"),
            ("PROPTEST_CASES", "20000"),
        ] {
            assert_eq!(variables.get(OsStr::new(name)).copied(), Some(OsStr::new(value)), "{name}");
        }
    }

    #[test]
    fn seeds_are_parsed_as_the_tests_print_them() {
        assert_eq!(parse_seed("0x000000000000002a"), Ok(42));
        assert_eq!(parse_seed("42"), Ok(42));
        assert!(parse_seed("many").is_err());
    }
}
