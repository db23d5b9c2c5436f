//! The harness of the end-to-end tests: tests with preconditions. The harness skips a test with a reason if a
//! precondition is not met.
//!
//! A test binary sets `harness = false` in `Cargo.toml` and registers its tests:
//!
//! ```no_run
//! use std::process::ExitCode;
//! use ringpass_tests::{harness::{self, test}, needs::Need};
//!
//! fn main() -> ExitCode {
//!     harness::run(vec![
//!         test("a_ring_can_be_created", [Need::io_uring()], || {
//!             io_uring::IoUring::new(8)?;
//!             Ok(())
//!         }),
//!     ])
//! }
//! ```
//!
//! The harness checks preconditions when it lists the tests, because a test runner (cargo-nextest, or `cargo test`)
//! learns only then that a test is ignored. A test with an unmet one is *ignored*: counted as skipped, never as passed,
//! and its reason goes to stderr and to the file that `cargo xtask test` prints at its end. Where nothing may be
//! skipped (`CI=true` or `RINGPASS_NO_SKIP=1`) the same test *fails* with that reason.
//!
//! The tests of a program run one at a time, each between two looks at the kernel log: a warning of the kernel fails the test.

use std::{
    collections::HashSet,
    env,
    ffi::OsStr,
    fs::OpenOptions,
    io::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Once,
    time::Duration,
};

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};

use crate::{kernel_log::KernelLog, needs::Need};

/// Environment variable: the file to which skipped tests and notes are appended, one per line, with tabs between
/// `skipped` or `note`, the test's name, and the reason.
pub const SKIP_LOG_VARIABLE: &str = "RINGPASS_SKIP_LOG";
/// Environment variable: when set (and not `0` or `false`), a main-path test whose needs are unmet fails. `CI` does the same.
pub const NO_SKIP_VARIABLE: &str = "RINGPASS_NO_SKIP";
/// Environment variable: when set (and not `0` or `false`), tests use the budgets of a long run.
pub const SOAK_VARIABLE: &str = "RINGPASS_SOAK";
/// Environment variable: how long one test of a long run takes, in seconds, instead of its own budget.
pub const SOAK_SECONDS_VARIABLE: &str = "RINGPASS_SOAK_SECONDS";

type Body = Box<dyn FnOnce() -> Result<()> + Send>;

/// A registered test. Made by [`test()`].
pub struct Test {
    name: String,
    needs: Vec<Need>,
    body: Body,
    soak_only: bool,
    off_main_path: Option<&'static str>,
}

/// Registers a test under a name that says which behaviour it shows, with what it needs of the machine.
pub fn test(
    name: impl Into<String>,
    needs: impl IntoIterator<Item = Need>,
    body: impl FnOnce() -> Result<()> + Send + 'static,
) -> Test {
    Test {
        name: name.into(),
        needs: needs.into_iter().collect(),
        body: Box::new(body),
        soak_only: false,
        off_main_path: None,
    }
}

impl Test {
    /// The test runs only in a long run (`cargo xtask soak`) and is skipped otherwise, in CI too.
    pub fn soak_only(mut self) -> Self {
        self.soak_only = true;
        self
    }

    /// The test may be skipped even where nothing else may, because `why` (for example hardware that few machines have).
    pub fn off_main_path(mut self, why: &'static str) -> Self {
        self.off_main_path = Some(why);
        self
    }

    fn fate(&self, no_skip: bool, soak: bool) -> Fate {
        if self.soak_only && !soak {
            return Fate::Skip("a long run: `cargo xtask soak` runs it".to_owned());
        }
        let unmet: Vec<String> =
            self.needs.iter().filter_map(|need| need.check().err()).map(|error| error.to_string()).collect();
        match (unmet.is_empty(), self.off_main_path) {
            (true, _) => Fate::Run,
            (false, Some(why)) => Fate::Skip(format!("{} (may be skipped: {why})", unmet.join("; "))),
            (false, None) if no_skip => Fate::Fail(unmet.join("; ")),
            (false, None) => Fate::Skip(unmet.join("; ")),
        }
    }
}

/// What this process does with a test.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Run,
    Skip(String),
    Fail(String),
}

/// Runs or lists the tests as the command line says (the arguments of Rust's own test programs).
///
/// # Panics
///
/// `tests` is empty or has a name twice: either would let a test runner report success for a test that never ran.
pub fn run(tests: Vec<Test>) -> ExitCode {
    assert!(!tests.is_empty(), "no tests are registered");
    let mut names = HashSet::new();
    for test in &tests {
        assert!(names.insert(&test.name), "two tests are called {:?}", test.name);
    }

    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let no_skip = flag("CI") || flag(NO_SKIP_VARIABLE);
    let soak = is_soak();
    let trials = tests.into_iter().map(|test| trial(test, no_skip, soak, &arguments)).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(test: Test, no_skip: bool, soak: bool, arguments: &Arguments) -> Trial {
    let fate = test.fate(no_skip, soak);
    let Test { name, body, .. } = test;
    match fate {
        Fate::Run => Trial::test(name.clone(), move || run_body(&name, body)),
        Fate::Fail(reason) => Trial::test(name, move || Err(format!("cannot run here: {reason}").into())),
        Fate::Skip(reason) => {
            let report = report_line("skipped", &name, &reason);
            // The test runs only if the command line asks for ignored tests, and then it cannot pass.
            let trial = Trial::test(name.clone(), {
                let reason = reason.clone();
                move || Err(format!("cannot run here: {reason}").into())
            })
            .with_ignored_flag(true);
            let is_selected = arguments.list || !arguments.is_filtered_out(&trial);
            if is_selected {
                eprintln!("skipped {name}: {reason}");
                log_skip(&report);
            }
            trial
        }
    }
}

fn run_body(name: &str, body: Body) -> Result<(), Failed> {
    let kernel_log = KernelLog::now().inspect_err(|error| note_unreadable_kernel_log(name, error)).ok();
    let outcome = catch_unwind(AssertUnwindSafe(body));
    let trouble = match kernel_log.map(|mut log| log.trouble()) {
        Some(Ok(lines)) => lines,
        Some(Err(error)) => {
            note_unreadable_kernel_log(name, &error);
            Vec::new()
        }
        None => Vec::new(),
    };
    let trouble = (!trouble.is_empty())
        .then(|| format!("the kernel log has trouble since the test began:\n    {}", trouble.join("\n    ")));

    match (outcome, trouble) {
        (Ok(Ok(())), None) => Ok(()),
        (Ok(Ok(())), Some(trouble)) => Err(trouble.into()),
        (Ok(Err(error)), trouble) => Err(describe(&error, trouble).into()),
        (Err(panic), trouble) => {
            if let Some(trouble) = trouble {
                eprintln!("{trouble}");
            }
            resume_unwind(panic)
        }
    }
}

/// The error with its causes, one per line. (`{:?}` of anyhow would add a backtrace of the harness.)
fn describe(error: &anyhow::Error, trouble: Option<String>) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        text.push_str("\n  because: ");
        text.push_str(&cause.to_string());
    }
    if let Some(trouble) = trouble {
        text.push('\n');
        text.push_str(&trouble);
    }
    text
}

fn note_unreadable_kernel_log(name: &str, error: &io::Error) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        eprintln!("note: the kernel log is not looked at: {error}");
        let reason = format!("ran without a look at the kernel log: {error}");
        log_skip(&report_line("note", name, &reason));
    });
}

/// Reports that `test` runs and passes without one of its checks. `cargo xtask test` shows `reason` behind "N tests" at
/// its end.
pub fn note(test: &str, reason: &str) {
    eprintln!("note: {test} {reason}");
    log_skip(&report_line("note", test, reason));
}

fn report_line(kind: &str, name: &str, reason: &str) -> String {
    let one_line = reason.replace(['\n', '\t'], " ");
    format!("{kind}\t{}::{name}\t{one_line}\n", binary_name())
}

/// The test binary's name as Cargo's manifest has it, without the hash that Cargo adds to the file.
fn binary_name() -> String {
    let executable = env::current_exe().unwrap_or_default();
    let stem = executable.file_stem().and_then(OsStr::to_str).unwrap_or("test").to_owned();
    stem.rsplit_once('-').map_or(stem.clone(), |(name, _hash)| name.to_owned())
}

fn log_skip(line: &str) {
    let Some(path) = env::var_os(SKIP_LOG_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from) else {
        return;
    };
    if let Err(error) = append(&path, line) {
        panic!("{SKIP_LOG_VARIABLE}: cannot append to {}: {error}", path.display());
    }
}

/// One `write` in append mode: test processes that run at the same time do not mix their lines.
fn append(path: &Path, line: &str) -> io::Result<()> {
    OpenOptions::new().create(true).append(true).open(path)?.write_all(line.as_bytes())
}

/// Whether this is a long run (`cargo xtask soak`).
pub fn is_soak() -> bool {
    flag(SOAK_VARIABLE)
}

/// The amount of a test's work: `ci` in every test run, `soak` in a long run. For counts, sizes and lists of cases.
pub fn budget<T>(ci: T, soak: T) -> T {
    if is_soak() { soak } else { ci }
}

/// The duration of a test: `ci` in every test run; in a long run `soak`, or the value of `cargo xtask soak --seconds`.
///
/// # Panics
///
/// `RINGPASS_SOAK_SECONDS` is set and not a whole number of seconds.
pub fn time_budget(ci: Duration, soak: Duration) -> Duration {
    if !is_soak() {
        return ci;
    }
    match env::var(SOAK_SECONDS_VARIABLE) {
        Ok(text) => Duration::from_secs(text.parse().unwrap_or_else(|error| {
            panic!("{SOAK_SECONDS_VARIABLE}={text:?} is not a whole number of seconds: {error}")
        })),
        Err(_) => soak,
    }
}

fn flag(variable: &str) -> bool {
    env::var_os(variable).is_some_and(|value| !["", "0", "false"].iter().any(|off| value == *off))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use anyhow::{Context, bail};

    use super::*;

    fn unmet(what: &'static str) -> Need {
        Need::new(what, || bail!("there is none"))
    }

    #[test]
    fn every_unmet_need_is_in_the_reason() {
        let both = test("t", [unmet("a disk"), Need::cpus(1), unmet("a guest")], || Ok(()));
        let reason = "needs a disk: there is none; needs a guest: there is none".to_owned();
        assert_eq!(both.fate(false, false), Fate::Skip(reason.clone()));
        assert_eq!(both.fate(true, false), Fate::Fail(reason));
    }

    #[test]
    fn a_long_run_outside_the_soak_is_skipped_even_where_nothing_else_may_be() {
        let long = || test("t", [unmet("a disk")], || Ok(())).soak_only();
        assert!(matches!(long().fate(true, false), Fate::Skip(reason) if reason.contains("cargo xtask soak")));
        assert!(matches!(long().fate(true, true), Fate::Fail(_)));
        assert_eq!(test("t", [], || Ok(())).soak_only().fate(true, true), Fate::Run);
    }

    /// With Rust's own harness, a program's `main` and all its tests would never run, and no message would say so.
    #[test]
    fn every_test_program_uses_this_harness() {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let manifest = fs::read_to_string(package.join("Cargo.toml")).expect("the manifest of this package");
        let programs = fs::read_dir(package.join("tests")).expect("the test programs");
        let mut count = 0;
        for path in programs.map(|entry| entry.expect("a directory entry").path()) {
            let name = path.file_stem().and_then(OsStr::to_str).expect("a name in ASCII");
            // `harness_skips` has the tests of the harness itself: a fault of the harness that hides failures would
            // hide theirs too.
            let is_program = path.extension() == Some(OsStr::new("rs")) || path.join("main.rs").exists();
            if is_program && name != "harness_skips" {
                let entry = format!("[[test]]\nname = \"{name}\"\nharness = false\n");
                assert!(manifest.contains(&entry), "tests/Cargo.toml lacks this:\n{entry}");
                count += 1;
            }
        }
        assert!(count > 0, "no test programs");
    }

    #[test]
    fn an_error_is_described_with_all_its_causes() {
        let error = Err::<(), _>(io::Error::from(rustix::io::Errno::NOENT))
            .context("cannot open the disk")
            .context("cannot start the queue")
            .expect_err("made as one");
        assert_eq!(
            describe(&error, Some("kernel: x".to_owned())),
            "cannot start the queue\n  because: cannot open the disk\n  because: No such file or directory (os error 2)\nkernel: x"
        );
    }
}
