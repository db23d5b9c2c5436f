//! The fuzz targets in `fuzz/`, run by cargo-fuzz on a nightly toolchain. Where there is none, they count as skipped:
//! their bodies are property tests too.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    steps::{self, cargo},
    test::TestRun,
};

/// The version that is installed if there is none. The crate `libfuzzer-sys` in `fuzz/Cargo.toml` goes with it.
const CARGO_FUZZ_VERSION: &str = "0.13.2";

/// A file in `fuzz/fuzz_targets`.
struct Target {
    name: &'static str,
    /// The longest input in bytes that is worth trying.
    input_bytes_max: u32,
}

const TARGETS: &[Target] = &[
    Target { name: "virtio_blk_request", input_bytes_max: 256 },
    Target { name: "inflight_region", input_bytes_max: 512 },
    Target { name: "vhost_user_message", input_bytes_max: 512 },
    Target { name: "vhost_user_session", input_bytes_max: 1024 },
    Target { name: "policy_file", input_bytes_max: 2048 },
    Target { name: "policy_check", input_bytes_max: 512 },
    Target { name: "policy_kernel", input_bytes_max: 512 },
];

/// How long and with which choices.
pub(crate) struct Budget {
    /// For each target.
    pub(crate) seconds: u64,
    pub(crate) seed: Option<u64>,
    /// Whether to begin with what earlier runs found, and to keep what this one finds.
    pub(crate) keeps_corpus: bool,
}

/// The command of Cargo that runs the tests which save seeds, where not all tests are run anyway.
pub(crate) const SAVE_SEEDS: &[&str] = &[
    "nextest",
    "run",
    "--package",
    "ringpass-broker",
    "--package",
    "ringpass-restrictions",
    "--package",
    "ringpass-policy-on-kernel",
    "--lib",
    "--filterset",
    "test(/(fuzzing|message)::tests::/)",
];

/// Builds and runs each target, from the seeds that the tests of `tests` saved.
pub(crate) fn run(tests: &TestRun, budget: &Budget) -> Result<()> {
    if let Err(reason) = make_available() {
        for target in TARGETS {
            tests.skip(&format!("fuzz::{}", target.name), &reason)?;
        }
        println!("skipped: {reason}");
        return Ok(());
    }
    steps::run(&mut build())?;
    for target in TARGETS {
        run_target(target, &tests.fuzz_seeds().join(target.name), &corpus(tests, budget, target)?, budget)?;
    }
    Ok(())
}

/// The reason why nothing can be fuzzed, if there is one.
fn make_available() -> Result<(), String> {
    if !steps::is_available("rustup", &["run", "nightly", "rustc", "--version"]) {
        return Err("needs a nightly toolchain: rustup toolchain install nightly".into());
    }
    if !steps::is_available("rustup", &["run", "nightly", "cargo", "fuzz", "--version"]) {
        let mut install = cargo(&["install", "cargo-fuzz", "--version", CARGO_FUZZ_VERSION, "--locked"]);
        steps::run(&mut install).map_err(|error| format!("needs cargo-fuzz, which cannot be installed: {error:#}"))?;
    }
    Ok(())
}

fn cargo_fuzz(arguments: &[&str]) -> Command {
    let mut command = Command::new("rustup");
    // One unit, cargo-fuzz's choice, would leave all processors but one idle.
    command.args(["run", "nightly", "cargo", "fuzz"]).args(arguments).args(["--codegen-units", "16", "--target-dir"]);
    command.arg(target_directory().join("fuzz"));
    command
}

fn build() -> Command {
    cargo_fuzz(&["build"])
}

fn run_target(target: &Target, seeds: &Path, corpus: &Path, budget: &Budget) -> Result<()> {
    fs::create_dir_all(corpus).with_context(|| format!("making {}", corpus.display()))?;
    let artifacts = PathBuf::from("fuzz/artifacts").join(target.name);
    let before = files(&artifacts);
    let mut command = cargo_fuzz(&["run", target.name]);
    // What is new goes to the first.
    command.arg(corpus);
    if seeds.is_dir() {
        command.arg(seeds);
    } else {
        println!("no test saved seeds for {}: it begins with nothing", target.name);
    }
    command.arg("--").args(options(target, budget));
    steps::run(&mut command).map_err(|error| {
        let new = files(&artifacts);
        match new.difference(&before).next() {
            Some(input) => error.context(finding(target.name, input)),
            None => error,
        }
    })
}

/// What libFuzzer is told (<https://llvm.org/docs/LibFuzzer.html#options>).
fn options(target: &Target, budget: &Budget) -> Vec<String> {
    let mut options = vec![
        format!("-max_total_time={}", budget.seconds),
        format!("-max_len={}", target.input_bytes_max),
        // One input takes microseconds: a minute is a hang, however busy the machine is.
        "-timeout=60".into(),
        "-verbosity=0".into(),
        "-print_funcs=0".into(),
        "-print_final_stats=1".into(),
    ];
    // 0 would mean a random one.
    options.extend(budget.seed.map(|seed| format!("-seed={}", (seed as u32).max(1))));
    options
}

/// What to say of an input that made a target fail.
fn finding(target: &str, input: &Path) -> String {
    let input = input.display();
    format!(
        "the fuzz target {target} fails with the input {input}\nreplay it with:\n  cargo +nightly fuzz run {target} \
         {input}\nand make it a test beside the code"
    )
}

fn files(directory: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

fn corpus(tests: &TestRun, budget: &Budget, target: &Target) -> Result<PathBuf> {
    let directory =
        if budget.keeps_corpus { target_directory().join("fuzz-corpus") } else { tests.fuzz_seeds().join("found") };
    let directory = directory.join(target.name);
    // cargo-fuzz runs the target in another directory.
    std::path::absolute(&directory).with_context(|| format!("the path {}", directory.display()))
}

fn target_directory() -> PathBuf {
    let directory = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    std::path::absolute(&directory).unwrap_or(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_its_file_and_its_entry_in_the_manifest_and_the_reverse() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).expect("the manifest");
        let names: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
        let stems = files(&fuzz.join("fuzz_targets"))
            .into_iter()
            .map(|file| file.file_stem().and_then(|stem| stem.to_str()).expect("a name in ASCII").to_owned());
        assert_eq!(names, stems.collect());
        for name in &names {
            assert!(manifest.contains(&format!("name = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"")), "{name}");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), names.len());
    }

    #[test]
    fn a_finding_names_the_input_and_how_to_replay_it() {
        assert_eq!(
            finding("inflight_region", Path::new("fuzz/artifacts/inflight_region/crash-12")),
            "the fuzz target inflight_region fails with the input fuzz/artifacts/inflight_region/crash-12\n\
             replay it with:\n  \
             cargo +nightly fuzz run inflight_region fuzz/artifacts/inflight_region/crash-12\n\
             and make it a test beside the code"
        );
    }

    #[test]
    fn a_seed_of_64_bits_becomes_one_that_libfuzzer_takes() {
        let target = Target { name: "a", input_bytes_max: 9 };
        let seed = |seed| options(&target, &Budget { seconds: 1, seed, keeps_corpus: false }).pop();
        assert_eq!(seed(Some(0x1_0000_002a)).as_deref(), Some("-seed=42"));
        assert_eq!(seed(Some(0)).as_deref(), Some("-seed=1"));
        assert_eq!(seed(None).as_deref(), Some("-print_final_stats=1"));
    }
}
