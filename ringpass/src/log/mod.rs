//! Logs and error messages of the programs, all on standard error.

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

/// How long the program waits at its end for a reader that accepts no lines.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// The lines of this process that are not yet written.
static LINES: Lines = Lines::new();

/// Starts logging with the filter of `RUST_LOG`, or else with `level`.
///
/// A log that cannot be written (its reader is gone or does not read, or its file is full) neither ends nor delays the
/// program: the lines are lost, and the log states their number when there is room again.
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

/// Waits a limited time for lines that are not written yet. Call this before the process ends other than through
/// [`exit_code`].
pub(crate) fn flush() {
    LINES.flush(LAST_WAIT);
}

/// Starts a dedicated thread that writes the log from now on, so that no other thread ever waits for the reader.
///
/// A server calls this inside its sandbox, so the thread is confined like all others.
///
/// # Errors
///
/// The thread cannot be started.
pub(crate) fn write_in_background() -> io::Result<()> {
    LINES.write_in_background()
}

/// Converts the result into the exit status of a program. Prints an error as one line.
pub(crate) fn exit_code(program: &str, result: anyhow::Result<ExitCode>) -> ExitCode {
    let status = result.unwrap_or_else(|error| {
        tell(program, &error);
        ExitCode::FAILURE
    });
    flush();
    status
}

/// Prints an error and its causes, each once, as one line.
pub(crate) fn tell(program: &str, error: &anyhow::Error) {
    LINES.push_always(format!("{program}: {}{}\n", Chain(error.as_ref()), advice(error)).into_bytes());
}

/// Advice for a cause that can occur anywhere.
fn advice(error: &anyhow::Error) -> &'static str {
    let has_cause = |wanted: Errno| {
        let causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
        causes.filter_map(Errno::from_io_error).any(|errno| errno == wanted)
    };
    if has_cause(Errno::MFILE) && !error.chain().any(|cause| cause.to_string().contains("RLIMIT_NOFILE")) {
        return ". Raise RLIMIT_NOFILE (`ulimit -n`, LimitNOFILE= in a systemd unit)";
    }
    ""
}

/// The writer of one log event: `tracing-subscriber` writes each event with one call.
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

/// Formats an event as a single line. `tracing-subscriber` has escaped escape characters in foreign text, but not line
/// breaks and other control characters; its own colour codes stay.
fn one_line(event: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(event);
    let parts: Vec<String> =
        text.trim_end_matches('\n').split('\u{1b}').map(|part| printable(part).to_string()).collect();
    (parts.join("\u{1b}") + "\n").into_bytes()
}

/// Reports a panic like the standard library, but through the log, so that the report waits for no reader.
fn tell_panic(info: &panic::PanicHookInfo<'_>) {
    let thread = thread::current();
    let mut text = format!("thread {} panicked", thread.name().unwrap_or("without a name"));
    if let Some(place) = info.location() {
        text += &format!(" at {place}");
    }
    let payload = info.payload();
    let message = payload.downcast_ref::<&str>().copied();
    if let Some(message) = message.or_else(|| payload.downcast_ref::<String>().map(String::as_str)) {
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
    fn an_event_becomes_one_line_and_keeps_its_colours() {
        assert_eq!(one_line(b"\x1b[32m INFO\x1b[0m disk=a\r\nb\tc\n"), b"\x1b[32m INFO\x1b[0m disk=a\\u{d}\\nb\\tc\n");
    }
}
