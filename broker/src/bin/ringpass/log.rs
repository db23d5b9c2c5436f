//! What the programs tell people besides results: logs and errors, all on standard error.

use std::io::{IsTerminal, Write, stderr};
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

/// Starts logging, as `RUST_LOG` says, or else from `level` on.
///
/// A log that cannot be written (its reader is gone, its file is full) must not end anything: what a line says is lost, and
/// nobody is left to be told.
pub(crate) fn start(level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let colours = stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(colours)
        .log_internal_errors(false)
        .init();
}

/// The exit status of a program. An error is one line.
pub(crate) fn exit_code(program: &str, result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        let _ = writeln!(stderr(), "{program}: {error:#}");
        ExitCode::FAILURE
    })
}
