//! The one-line reason why a server does not start, with what to change.

use ringpass_broker::disk::DiskError;
use ringpass_broker::probe::{Mode, ModeName, Report};

/// Refuses a mode that the probe reports as not available, with the probe's reason.
///
/// # Errors
///
/// The mode is not available.
pub(crate) fn unless_available(report: &Report, name: ModeName) -> anyhow::Result<()> {
    match report.mode(name) {
        Some(mode) if !mode.available => Err(anyhow::anyhow!("no guest can be served here: {}", one_line(mode))),
        _ => Ok(()),
    }
}

/// Adds advice to the error if another process has the disk: the server can wait for that process.
pub(crate) fn advise(error: DiskError) -> anyhow::Error {
    if error.is_busy() {
        anyhow::anyhow!("{error}, or let the server wait longer (--lock-wait-s)")
    } else {
        error.into()
    }
}

/// The reason, and every remedy.
pub(crate) fn one_line(mode: &Mode) -> String {
    line(mode.why.as_deref(), &mode.change)
}

fn line(why: Option<&str>, changes: &[String]) -> String {
    let mut line = why.unwrap_or("it is not available").to_owned();
    for (index, change) in changes.iter().enumerate() {
        line.push_str(if index == 0 { ". Remedy: " } else { "; " });
        line.push_str(change.trim_end_matches(':'));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_the_reason_and_every_remedy() {
        let change = ["set this".to_owned(), "or that:".to_owned()];
        assert_eq!(line(Some("the kernel refuses"), &change), "the kernel refuses. Remedy: set this; or that");
    }
}
