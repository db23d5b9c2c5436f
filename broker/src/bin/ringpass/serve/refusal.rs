//! Why the server does not start, with what to change, in one line.

use ringpass_broker::disk::DiskError;
use ringpass_broker::engine::EngineError;
use ringpass_broker::probe::{self, Check, Status};

/// If the kernel gives no io_uring: who forbids it, and how to allow it.
pub(super) fn explain(error: EngineError) -> anyhow::Error {
    let check = match &error {
        EngineError::Ring(_) => probe::run().ok().and_then(|report| missing_io_uring(report.checks)),
        _ => None,
    };
    match check {
        Some(check) => anyhow::anyhow!("{}", one_line(&check)),
        None => error.into(),
    }
}

/// If another process has the disk: that the server can wait for it.
pub(super) fn advise(error: DiskError) -> anyhow::Error {
    if error.is_busy() {
        anyhow::anyhow!("{error}, or have the server wait longer for it (--lock-wait-s)")
    } else {
        error.into()
    }
}

fn missing_io_uring(checks: Vec<Check>) -> Option<Check> {
    checks.into_iter().find(|check| check.name == "io-uring" && check.status == Status::Missing)
}

fn one_line(check: &Check) -> String {
    let mut line = format!("io_uring cannot be used: {}", check.why.as_deref().unwrap_or(&check.detail));
    for (index, change) in check.change.iter().enumerate() {
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
        let mut check = probe::run().unwrap().checks.swap_remove(0);
        check.why = Some("nobody may".to_owned());
        check.change = vec!["set this".to_owned(), "or that:".to_owned()];
        assert_eq!(one_line(&check), "io_uring cannot be used: nobody may. To change it: set this; or that");
        assert_eq!(missing_io_uring(vec![check.clone()]), None, "it is there");
        check.status = Status::Missing;
        assert!(missing_io_uring(vec![check]).is_some());
    }
}
