//! Why the server does not start, with what to change, in one line.

use ringpass_broker::disk::DiskError;
use ringpass_broker::probe::{Mode, ModeName, Report};

/// Refuses a way to serve that the probe calls not available, for the reason that the probe gives.
///
/// # Errors
///
/// It is not available.
pub(crate) fn unless_available(report: &Report, name: ModeName) -> anyhow::Result<()> {
    match report.mode(name) {
        Some(mode) if !mode.available => Err(anyhow::anyhow!("no guest can be served here: {}", one_line(mode))),
        _ => Ok(()),
    }
}

/// If another process has the disk: that the server can wait for it.
pub(crate) fn advise(error: DiskError) -> anyhow::Error {
    if error.is_busy() {
        anyhow::anyhow!("{error}, or have the server wait longer for it (--lock-wait-s)")
    } else {
        error.into()
    }
}

/// The reason, and every way out.
pub(crate) fn one_line(mode: &Mode) -> String {
    let mut line = mode.why.clone().unwrap_or_else(|| "it is not available".to_owned());
    for (index, change) in mode.change.iter().enumerate() {
        line.push_str(if index == 0 { ". To change it: " } else { "; " });
        line.push_str(change.trim_end_matches(':'));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_the_reason_and_every_way_out() {
        let mode = Mode {
            name: ModeName::Virtqueue,
            available: false,
            why: Some("nobody may".to_owned()),
            change: vec!["set this".to_owned(), "or that:".to_owned()],
            notes: vec![],
        };
        assert_eq!(one_line(&mode), "nobody may. To change it: set this; or that");
    }
}
