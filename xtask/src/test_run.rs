//! A run of tests: its skipped tests, and what the kernel logged meanwhile.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::{kernel_log::KernelLog, steps};

/// A run of tests, with its skipped tests and the messages in the kernel log.
pub(crate) struct TestRun {
    directory: TempDir,
    kernel_log: io::Result<KernelLog>,
}

impl TestRun {
    pub(crate) fn begin() -> Result<Self> {
        let directory =
            TempDir::with_prefix("ringpass-test-run-").context("cannot create a directory for the skip log")?;
        Ok(Self { directory, kernel_log: KernelLog::now() })
    }

    /// Runs a command whose tests append skipped tests to the file in `RINGPASS_SKIP_LOG` (see the crate
    /// `ringpass-tests`).
    pub(crate) fn run(&self, mut command: Command) -> Result<()> {
        let command = command.env("RINGPASS_SKIP_LOG", self.skip_log()).env("RINGPASS_FUZZ_SEEDS", self.fuzz_seeds());
        steps::run(command)
    }

    /// Counts a test that Cargo does not run as skipped.
    pub(crate) fn skip(&self, name: &str, reason: &str) -> Result<()> {
        let path = self.skip_log();
        let log = fs::OpenOptions::new().create(true).append(true).open(&path);
        // One line for each test, although a reason may have several.
        let line = format!("skipped\t{name}\t{}\n", reason.replace(['\n', '\t'], " "));
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// The directory in which the tests save inputs for fuzz targets.
    pub(crate) fn fuzz_seeds(&self) -> PathBuf {
        self.directory.path().join("fuzz-seeds")
    }

    /// Checks the kernel log for late messages and for those of tests without the harness, which checks it around each
    /// test.
    pub(crate) fn check_kernel_log(&mut self) -> Result<()> {
        let lines = match &mut self.kernel_log {
            Ok(log) => log.trouble().context("cannot read the kernel log")?,
            Err(error) => {
                println!("kernel log not checked: {error}");
                return Ok(());
            }
        };
        if !lines.is_empty() {
            bail!("the kernel logged warnings while the tests ran:\n  {}", lines.join("\n  "));
        }
        println!("the kernel logged no warning while the tests ran");
        Ok(())
    }

    /// Prints each skipped test with its reason, and each note, once.
    pub(crate) fn print_skipped(&self) -> Result<()> {
        let report = read_report(&self.skip_log())?;
        println!();
        match report.skipped.len() {
            0 => println!("No test was skipped."),
            count => println!("{count} skipped tests, with the reasons:"),
        }
        for (name, reason) in &report.skipped {
            println!("  {name}: {reason}");
        }
        for (reason, names) in &report.notes {
            println!("Note: {names} tests {reason}");
        }
        Ok(())
    }

    fn skip_log(&self) -> PathBuf {
        self.directory.path().join("skipped")
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct SkipReport {
    /// Tests with their reasons.
    skipped: BTreeSet<(String, String)>,
    /// Reasons, with the number of tests.
    notes: std::collections::BTreeMap<String, usize>,
}

fn read_report(path: &Path) -> Result<SkipReport> {
    match fs::read_to_string(path) {
        Ok(text) => parse_report(&text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(SkipReport::default()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Parses the skip log. A test is listed several times and therefore reports its skip several times.
fn parse_report(text: &str) -> Result<SkipReport> {
    let mut report = SkipReport::default();
    let lines: BTreeSet<&str> = text.lines().collect();
    for line in lines {
        match *line.split('\t').collect::<Vec<_>>().as_slice() {
            ["skipped", name, reason] => {
                report.skipped.insert((name.to_owned(), reason.to_owned()));
            }
            ["note", _name, reason] => *report.notes.entry(reason.to_owned()).or_default() += 1,
            _ => bail!("the skip log has a line that is not `skipped` or `note`, test, reason: {line:?}"),
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_reported_twice_counts_once() {
        let report = parse_report(
            "skipped\tdisks::b\tneeds root: the user id is 1000\n\
             note\tdisks::a\tran without a look at the kernel log: x\n\
             skipped\tdisks::b\tneeds root: the user id is 1000\n\
             note\tdisks::c\tran without a look at the kernel log: x\n",
        )
        .expect("four good lines");
        assert_eq!(
            report.skipped.into_iter().collect::<Vec<_>>(),
            [("disks::b".to_owned(), "needs root: the user id is 1000".to_owned())]
        );
        assert_eq!(
            report.notes.into_iter().collect::<Vec<_>>(),
            [("ran without a look at the kernel log: x".to_owned(), 2)]
        );
    }

    #[test]
    fn a_skip_of_another_test_is_in_the_report() {
        let run = TestRun::begin().expect("a directory");
        run.skip("fuzz::a", "needs this:\n\tand that").expect("a log");
        run.skip("fuzz::b", "needs this").expect("a log");
        let report = read_report(&run.skip_log()).expect("two good lines");
        let reason =
            |name: &str| report.skipped.iter().find(|(skipped, _)| skipped == name).map(|(_, why)| why.as_str());
        assert_eq!((reason("fuzz::a"), reason("fuzz::b")), (Some("needs this:  and that"), Some("needs this")));
    }

    #[test]
    fn a_broken_line_in_the_skip_log_is_an_error() {
        assert!(parse_report("skipped\tonly a name\n").is_err());
    }

    #[test]
    fn a_missing_skip_log_means_no_skips() {
        assert_eq!(read_report(Path::new("/no/such/file")).expect("no file is no skip"), SkipReport::default());
    }
}
