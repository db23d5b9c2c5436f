//! Runs the fuzz targets in `fuzz/` with cargo-fuzz on a nightly toolchain. Without a nightly toolchain the targets
//! count as skipped; their bodies are also property tests.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, ensure};

use crate::{
    steps::{self, cargo},
    test_run::TestRun,
};

/// The version of cargo-fuzz to install if it is missing. It must match the crate `libfuzzer-sys` in `fuzz/Cargo.toml`.
const CARGO_FUZZ_VERSION: &str = "0.13.2";

/// A file in `fuzz/fuzz_targets`.
struct Target {
    name: &'static str,
    /// Maximum useful length of an input in bytes.
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

/// The duration and the seed of a fuzz run.
pub(crate) struct Budget {
    /// Time for each target.
    pub(crate) seconds: u64,
    pub(crate) seed: Option<u64>,
    /// Whether to start with the inputs that earlier runs found, and to keep those of this run.
    pub(crate) keeps_corpus: bool,
}

/// The Cargo command that runs only the tests that save seeds.
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

/// Builds and runs each target, starting from the seeds that the tests in `tests` saved.
pub(crate) fn run(tests: &TestRun, budget: &Budget) -> Result<()> {
    if let Err(reason) = make_available() {
        for target in TARGETS {
            tests.skip(&format!("fuzz::{}", target.name), &reason)?;
        }
        println!("skipped: {reason}");
        return Ok(());
    }
    steps::run(&mut build())?;
    let runs: Vec<_> = TARGETS
        .iter()
        .map(|target| Ok((target, tests.fuzz_seeds().join(target.name), corpus(tests, budget, target)?)))
        .collect::<Result<_>>()?;
    // A fuzzer is one thread.
    let at_once = thread::available_parallelism().context("cannot count the CPUs")?.get();
    let failures = failures_of_all(&runs, at_once, |(target, seeds, corpus)| run_target(target, seeds, corpus, budget));
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// Does the work for all items, `at_once` items at a time, and returns the errors. A failure does not end the others'
/// work.
fn failures_of_all<T: Sync>(items: &[T], at_once: usize, work: impl Fn(&T) -> Result<()> + Sync) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..at_once.min(items.len()) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = work(item) {
                        failures.lock().expect("no thread panicked").push(format!("{error:#}"));
                    }
                }
            });
        }
    });
    failures.into_inner().expect("no thread panicked")
}

/// Ensures that cargo-fuzz is available. An error states why fuzzing is not possible.
fn make_available() -> Result<(), String> {
    if !steps::is_available("rustup", &["run", "nightly", "rustc", "--version"]) {
        return Err("needs a nightly toolchain: rustup toolchain install nightly".into());
    }
    if !steps::is_available("rustup", &["run", "nightly", "cargo", "fuzz", "--version"]) {
        // Without optimisation, because it only starts other programs.
        let mut install = cargo(&["install", "cargo-fuzz", "--debug", "--version", CARGO_FUZZ_VERSION, "--locked"]);
        steps::run(&mut install)
            .map_err(|error| format!("needs cargo-fuzz, but its installation failed: {error:#}"))?;
    }
    Ok(())
}

fn cargo_fuzz(arguments: &[&str]) -> Command {
    let mut command = Command::new("rustup");
    // cargo-fuzz's default, one codegen unit, would use only one processor.
    command.args(["run", "nightly", "cargo", "fuzz"]).args(arguments).args(["--codegen-units", "16", "--target-dir"]);
    command.arg(target_directory().join("fuzz"));
    command
}

fn build() -> Command {
    cargo_fuzz(&["build"])
}

fn run_target(target: &Target, seeds: &Path, corpus: &Path, budget: &Budget) -> Result<()> {
    fs::create_dir_all(corpus).with_context(|| format!("cannot create {}", corpus.display()))?;
    let artifacts = PathBuf::from("fuzz/artifacts").join(target.name);
    let before = files(&artifacts);
    let mut command = cargo_fuzz(&["run", target.name]);
    // libFuzzer writes new inputs to the first directory.
    command.arg(corpus);
    if seeds.is_dir() {
        command.arg(seeds);
    } else {
        println!("no test saved seeds for {}: it starts without seeds", target.name);
    }
    command.arg("--").args(options(target, budget));
    steps::run_apart(&mut command).map_err(|error| {
        let new = files(&artifacts);
        match new.difference(&before).next() {
            Some(input) => error.context(finding(target.name, input)),
            None => error,
        }
    })
}

/// The options for libFuzzer (<https://llvm.org/docs/LibFuzzer.html#options>).
fn options(target: &Target, budget: &Budget) -> Vec<String> {
    let mut options = vec![
        format!("-max_total_time={}", budget.seconds),
        format!("-max_len={}", target.input_bytes_max),
        // One input takes microseconds, so a minute is a hang even on a busy machine.
        "-timeout=60".into(),
        "-verbosity=0".into(),
        "-print_funcs=0".into(),
        "-print_final_stats=1".into(),
    ];
    // 0 would mean a random seed.
    options.extend(budget.seed.map(|seed| format!("-seed={}", (seed as u32).max(1))));
    options
}

/// The message about an input that made a target fail.
fn finding(target: &str, input: &Path) -> String {
    let input = input.display();
    format!(
        "the fuzz target {target} fails with the input {input}\nreplay it with:\n  cargo +nightly fuzz run {target} \
         {input}\nand add a unit test for it beside the code"
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
    std::path::absolute(&directory).with_context(|| format!("cannot resolve the path {}", directory.display()))
}

fn target_directory() -> PathBuf {
    let directory = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    std::path::absolute(&directory).unwrap_or(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_targets_match_the_files_and_the_manifest() {
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
    fn every_target_runs_once_and_every_failure_is_reported() {
        let (running, most, runs) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        let both_run = std::sync::Barrier::new(2);
        let failures = failures_of_all(&[1, 2, 3, 4], 2, |number| {
            most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            both_run.wait();
            runs.fetch_add(1, Ordering::SeqCst);
            running.fetch_sub(1, Ordering::SeqCst);
            ensure!(number % 2 == 0, "{number} is odd");
            Ok(())
        });
        assert_eq!((runs.into_inner(), most.into_inner()), (4, 2));
        assert_eq!(
            failures.into_iter().collect::<BTreeSet<_>>(),
            BTreeSet::from(["1 is odd".into(), "3 is odd".into()])
        );
        assert_eq!(failures_of_all(&[0; 0], 2, |_| Ok(())), [""; 0]);
    }

    #[test]
    fn a_finding_names_the_input_and_how_to_replay_it() {
        assert_eq!(
            finding("inflight_region", Path::new("fuzz/artifacts/inflight_region/crash-12")),
            "the fuzz target inflight_region fails with the input fuzz/artifacts/inflight_region/crash-12\n\
             replay it with:\n  \
             cargo +nightly fuzz run inflight_region fuzz/artifacts/inflight_region/crash-12\n\
             and add a unit test for it beside the code"
        );
    }

    #[test]
    fn a_64_bit_seed_is_reduced_to_a_valid_libfuzzer_seed() {
        let target = Target { name: "a", input_bytes_max: 9 };
        let seed = |seed| options(&target, &Budget { seconds: 1, seed, keeps_corpus: false }).pop();
        assert_eq!(seed(Some(0x1_0000_002a)).as_deref(), Some("-seed=42"));
        assert_eq!(seed(Some(0)).as_deref(), Some("-seed=1"));
        assert_eq!(seed(None).as_deref(), Some("-print_final_stats=1"));
    }
}
