//! The rule for errors in the sources of all crates: a message contains its cause, so that code that prints only the
//! error (a field of a log line, an answer to a guest) prints the cause as well. `printable::Chain` relies on this rule
//! when it prints each part of a chain once.

use std::fs;
use std::path::{Path, PathBuf};

/// All Rust sources of the repository, except generated ones.
fn sources() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (mut directories, mut sources) = (Vec::new(), Vec::new());
    for part in [
        "broker/src",
        "ringpass/src",
        "restrictions/src",
        "guest-abi/src",
        "guest-driver",
        "benches",
        "tests",
        "xtask/src",
    ] {
        directories.push(root.join(part));
    }
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources.push(path);
            }
        }
    }
    sources
}

/// The `#[error(...)]` attributes of a source, each with the text up to the next attribute.
fn errors(text: &str) -> Vec<(&str, &str)> {
    let starts: Vec<usize> = text.match_indices("#[error(").map(|(start, _)| start).collect();
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    let each = starts.iter().zip(ends).filter_map(|(&start, end)| text[start..end].split_once(")]"));
    each.collect()
}

/// Whether the definition of the error has a cause, in one of the forms that `thiserror` supports.
fn has_cause(definition: &str) -> bool {
    let end = definition.find("\n}\n").unwrap_or(definition.len());
    let fields = definition[..end].lines().map(str::trim).filter(|line| !line.starts_with("//"));
    fields.into_iter().any(|line| {
        line.starts_with("source:")
            || line.starts_with("pub source:")
            || line.contains("#[source]")
            || line.contains("#[from]")
    })
}

#[test]
fn every_error_message_contains_its_cause() {
    let (mut seen, mut silent) = (0, Vec::new());
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        for (message, _) in errors(&text).into_iter().filter(|(_, definition)| has_cause(definition)) {
            seen += 1;
            if !["{source}", "{0}", "transparent"].iter().any(|way| message.contains(way)) {
                silent.push(format!("{}: {message})]", path.display()));
            }
        }
    }
    assert!(seen > 30, "only {seen} errors with a cause are found");
    assert!(silent.is_empty(), "messages without their cause:\n{}", silent.join("\n"));
}
