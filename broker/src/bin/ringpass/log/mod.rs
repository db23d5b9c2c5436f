//! What the programs tell people besides results: logs and errors, all on standard error.

mod lines;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal, Write, stderr};
use std::panic;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use ringpass_broker::before_process_end;
use ringpass_broker::printable::{Chain, printable};
use rustix::io::Errno;
use tracing_subscriber::EnvFilter;

use lines::Lines;

/// How long the end of the program waits for a reader that takes no lines.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// The lines of this process that standard error has yet to take.
static LINES: Lines = Lines::new();

/// Starts logging, as `RUST_LOG` says, or else from `level` on.
///
/// A log that cannot be written (its reader is gone or does not read, its file is full) ends nothing and holds up nothing: the
/// lines are lost, and their number is told when there is room again.
pub(crate) fn start(level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let colours = stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Event)
        .with_ansi(colours)
        .log_internal_errors(false)
        .init();
    panic::set_hook(Box::new(tell_panic));
    before_process_end(flush);
}

/// Waits a moment for lines that are not written yet. To be called before the process ends otherwise than by [`exit_code`].
pub(crate) fn flush() {
    LINES.flush(LAST_WAIT);
}

/// Has a thread of its own write the log from now on, so that no other thread ever waits for the reader.
///
/// A server calls this in its sandbox: the thread is confined like all others.
///
/// # Errors
///
/// There is no thread to be had.
pub(crate) fn write_in_background() -> io::Result<()> {
    LINES.write_in_background()
}

/// The exit status of a program. An error is one line.
pub(crate) fn exit_code(program: &str, result: anyhow::Result<ExitCode>) -> ExitCode {
    let status = result.unwrap_or_else(|error| {
        tell(program, &error);
        ExitCode::FAILURE
    });
    flush();
    status
}

/// Prints an error with its causes, each once, in one line.
pub(crate) fn tell(program: &str, error: &anyhow::Error) {
    LINES.push_always(format!("{program}: {}{}\n", Chain(error.as_ref()), advice(error)).into_bytes());
}

/// What can be done about a cause that can come up anywhere.
fn advice(error: &anyhow::Error) -> &'static str {
    let has_cause = |wanted: Errno| {
        let causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
        causes.filter_map(Errno::from_io_error).any(|errno| errno == wanted)
    };
    if has_cause(Errno::MFILE) && !error.chain().any(|cause| cause.to_string().contains("RLIMIT_NOFILE")) {
        return ". Raise the limit RLIMIT_NOFILE (`ulimit -n`, LimitNOFILE= in a systemd unit)";
    }
    ""
}

/// One event of the log: `tracing-subscriber` writes each with one call.
struct Event;

impl Write for Event {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        LINES.push(one_line(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An event as a single line. Of what others chose, `tracing-subscriber` has made escape characters harmless, but not line breaks
/// and the like; its own colours are left.
fn one_line(event: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(event);
    let parts: Vec<String> =
        text.trim_end_matches('\n').split('\u{1b}').map(|part| printable(part).to_string()).collect();
    (parts.join("\u{1b}") + "\n").into_bytes()
}

/// As the standard library does, but over the log, so that it waits for no reader.
fn tell_panic(info: &panic::PanicHookInfo<'_>) {
    let thread = thread::current();
    let mut text = format!("thread {} panicked", thread.name().unwrap_or("without a name"));
    if let Some(place) = info.location() {
        text += &format!(" at {place}");
    }
    if let Some(message) = info.payload_as_str() {
        text += &format!(": {message}");
    }
    let mut text = format!("{}\n", printable(&text));
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        text += &format!("{backtrace}\n");
    }
    LINES.push_always(text.into_bytes());
    flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_with_its_colours() {
        assert_eq!(one_line(b"\x1b[32m INFO\x1b[0m disk=a\r\nb\tc\n"), b"\x1b[32m INFO\x1b[0m disk=a\\u{d}\\nb\\tc\n");
    }
}
