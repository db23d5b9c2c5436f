//! Unit tests that cannot run on this kernel. `cargo xtask test` lists them at its end, as it lists those of the end-to-end tests.

use std::fs::OpenOptions;
use std::io::Write;

/// As in the harness of the end-to-end tests.
const SKIP_LOG_VARIABLE: &str = "RINGPASS_SKIP_LOG";

/// Notes that the test of that name has not looked at anything.
pub(crate) fn skipped(test: &str, why: &str) {
    eprintln!("skipped {test}: {why}");
    if let Some(path) = std::env::var_os(SKIP_LOG_VARIABLE) {
        let mut log = OpenOptions::new().create(true).append(true).open(path).unwrap();
        log.write_all(format!("skipped\t{test}\t{why}\n").as_bytes()).unwrap();
    }
}
