//! The committed files that are generated from the crate: the C header, and the tables of `docs/abi.md`.
//!
//! With `RINGPASS_REGENERATE=1` these tests write the files instead of comparing them.

mod document;
mod epoch_tables;
mod header;

use std::path::{Path, PathBuf};

fn in_repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Compares the file with the generated text, or writes it.
fn compare(path: &Path, expected: &str) {
    if std::env::var_os("RINGPASS_REGENERATE").is_some() {
        std::fs::write(path, expected).unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
        return;
    }
    let found = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("reading {}: {error}", path.display()));
    let first_difference = found.lines().zip(expected.lines()).position(|(found, expected)| found != expected);
    assert!(
        found == expected,
        "{} is stale, from line {}: RINGPASS_REGENERATE=1 cargo test -p ringpass-guest-abi --test generated",
        path.display(),
        first_difference.unwrap_or(found.lines().count().min(expected.lines().count())) + 1
    );
}
