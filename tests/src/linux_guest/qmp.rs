//! A client of QEMU's machine protocol: JSON lines over a socket (`docs/interop/qmp-spec.txt` of QEMU).

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, ErrorKind, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take for one command.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// How long one read waits before the limits are checked again.
const READ_WAIT: Duration = Duration::from_millis(200);

/// A connection to one QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    /// The received part of an incomplete line.
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and ends the negotiation.
    ///
    /// # Errors
    ///
    /// No process listens, or it is not a QEMU.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(READ_WAIT)).context("cannot set a time-out")?;
        let mut qmp = Self { stream: BufReader::new(stream), partial: Vec::new(), events: VecDeque::new() };
        let greeting = qmp.message(Instant::now() + COMMAND_LIMIT)?.context("QEMU sends no greeting")?;
        if greeting.get("QMP").is_none() {
            bail!("this is no QMP greeting: {greeting}");
        }
        qmp.execute(json!({"execute": "qmp_capabilities"}))?;
        Ok(qmp)
    }

    /// Executes one command, `{"execute": …, "arguments": {…}}`, and returns its result.
    ///
    /// # Errors
    ///
    /// QEMU answers with an error, or not at all.
    pub(super) fn execute(&mut self, command: Value) -> Result<Value> {
        let mut line = command.to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).with_context(|| format!("cannot send {command}"))?;
        let end = Instant::now() + COMMAND_LIMIT;
        while let Some(mut message) = self.message(end)? {
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                bail!("QEMU refuses {command}: {}", message["error"]["desc"].as_str().unwrap_or("?"));
            }
        }
        bail!("QEMU does not answer {command} in {COMMAND_LIMIT:?}");
    }

    /// Waits for an event of this name, and returns its data. Forgets older events of other names.
    ///
    /// # Errors
    ///
    /// The event does not come in this time, or the connection ends.
    pub(super) fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let end = Instant::now() + limit;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.message(end)?.with_context(|| format!("no event {name} in {limit:?}"))?,
            };
            if event["event"] == name {
                return Ok(event["data"].clone());
            }
        }
    }

    /// The next message. `None` if it does not come in time.
    fn message(&mut self, end: Instant) -> Result<Option<Value>> {
        loop {
            match self.stream.read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("QEMU closed its QMP connection"),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let message = serde_json::from_slice(&self.partial).context("cannot read QMP")?;
                    self.partial.clear();
                    return Ok(Some(message));
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if Instant::now() >= end {
                        return Ok(None);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot read QMP"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use super::*;

    /// Answers each line with the next text.
    fn fake_qemu(answers: Vec<&'static str>) -> (tempfile::TempDir, Qmp) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).expect("a socket");
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            stream.write_all(b"{\"QMP\": {\"version\": {}}}\n").expect("a greeting");
            let mut lines = BufReader::new(stream.try_clone().expect("a clone")).lines();
            for answer in ["{\"return\": {}}\n"].into_iter().chain(answers) {
                lines.next();
                stream.write_all(answer.as_bytes()).expect("an answer");
            }
            // The thread runs until the client disconnects.
            lines.next();
        });
        let qmp = Qmp::connect(&path).expect("a connection");
        (directory, qmp)
    }

    #[test]
    fn qmp_keeps_events_between_a_command_and_its_answer() {
        let (_directory, mut qmp) = fake_qemu(vec![
            "{\"event\": \"STOP\"}\n{\"event\": \"RESUME\", \"data\": {\"a\": 1}}\n{\"return\": {\"status\": \"running\"}}\n",
        ]);
        let status = qmp.execute(json!({"execute": "query-status"})).expect("an answer");
        assert_eq!(status, json!({"status": "running"}));
        assert_eq!(qmp.wait_event("RESUME", Duration::ZERO).expect("kept"), json!({"a": 1}));
        let refusal = qmp.wait_event("STOP", Duration::ZERO).expect_err("forgotten").to_string();
        assert_eq!(refusal, "no event STOP in 0ns");
    }

    #[test]
    fn the_error_has_the_command_that_qemu_refuses() {
        let (_directory, mut qmp) =
            fake_qemu(vec!["{\"error\": {\"class\": \"GenericError\", \"desc\": \"Device 'x' not found\"}}\n"]);
        let refusal = qmp.execute(json!({"execute": "device_del"})).expect_err("an error").to_string();
        assert_eq!(refusal, "QEMU refuses {\"execute\":\"device_del\"}: Device 'x' not found");
    }
}
