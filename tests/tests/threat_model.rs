//! The threat model names tests for its promises. Each of them must exist.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::harness::{self, test};

fn main() -> ExitCode {
    harness::run(vec![
        test("every_test_that_the_threat_model_names_exists", [], every_test_exists),
        test("a_test_that_does_not_exist_is_found", [], a_missing_test_is_found),
    ])
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The part of the document below this title.
fn section<'a>(document: &'a str, title: &str) -> Result<&'a str> {
    let begin = document.find(&format!("\n## {title}\n")).with_context(|| format!("no section {title:?}"))? + 1;
    let end = document[begin..].find("\n## ").map_or(document.len(), |end| begin + end);
    Ok(&document[begin..end])
}

/// What stands between backticks and has the form FILE.rs::NAME.
fn named_tests(text: &str) -> Vec<(&str, &str)> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter_map(|text| text.split_once("::").filter(|(file, _)| file.ends_with(".rs"))).collect()
}

/// A test is a function, or is registered with the harness by a string (also one that `format!` completes).
fn exists((file, name): (&str, &str)) -> Result<()> {
    let source = fs::read_to_string(root().join(file)).with_context(|| file.to_owned())?;
    let is_there = source.contains(&format!("fn {name}(")) || source.contains(&format!("\"{name}\""));
    ensure!(is_there, "{file} has no test {name}");
    Ok(())
}

fn every_test_exists() -> Result<()> {
    let document = fs::read_to_string(root().join("docs/threat-model.md"))?;
    for named in named_tests(&document) {
        exists(named)?;
    }
    // Each promise, the lines from one number to the next, names a test.
    let promises = section(&document, "Promises")?;
    let mut count = 0;
    while let Some(begin) = promises.find(&format!("\n{}. ", count + 1)) {
        let end = promises.find(&format!("\n{}. ", count + 2)).unwrap_or(promises.len());
        count += 1;
        ensure!(!named_tests(&promises[begin..end]).is_empty(), "promise {count} names no test");
    }
    ensure!(count >= 10, "only {count} promises were found");
    Ok(())
}

fn a_missing_test_is_found() -> Result<()> {
    let text = "1. **A promise.** `tests/tests/disk_limits.rs::a_file_cannot_grow` and `cargo::xtask`";
    let named = named_tests(text);
    ensure!(named == [("tests/tests/disk_limits.rs", "a_file_cannot_grow")], "{named:?}");
    // Only the beginning of a test's name.
    ensure!(exists(named[0]).is_err(), "{named:?}");
    ensure!(exists(("tests/tests/none.rs", "main")).is_err());
    exists(("tests/tests/threat_model.rs", "a_test_that_does_not_exist_is_found"))
}
