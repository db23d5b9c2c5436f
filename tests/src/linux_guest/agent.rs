//! The host's side of the guest's agent. It sends scripts over a serial port, and receives their output and exit
//! statuses.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{ErrorKind, Read, Write},
    mem,
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

/// How many of the last lines the report of a failure has.
const TAIL_LINES: usize = 30;

/// A script that runs, or has run, in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Job(u32);

/// The output of a script, and its exit status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobOutput {
    /// Standard output and standard error, line by line.
    pub text: String,
    /// The exit status of the shell.
    pub status: i32,
}

/// The progress of one script.
#[derive(Debug, Default)]
struct Progress {
    text: String,
    status: Option<i32>,
}

/// The connection to a guest's agent.
#[derive(Debug)]
pub(super) struct Agent {
    stream: UnixStream,
    partial: Vec<u8>,
    jobs: BTreeMap<u32, Progress>,
    last_job: u32,
    /// The number of boots of the guest.
    boots: u32,
    tail: VecDeque<String>,
}

impl Agent {
    /// Connects to the serial port.
    ///
    /// # Errors
    ///
    /// QEMU does not listen.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        Ok(Self { stream, partial: Vec::new(), jobs: BTreeMap::new(), last_job: 0, boots: 0, tail: VecDeque::new() })
    }

    /// Continues with the serial port of another QEMU, to which the guest has migrated. The old QEMU has ended.
    ///
    /// # Errors
    ///
    /// The rest of the old QEMU's output cannot be read.
    pub(super) fn move_to(&mut self, other: &mut Self) -> Result<()> {
        while self.pump(Duration::from_secs(1))? {}
        mem::swap(&mut self.stream, &mut other.stream);
        self.take(&mem::take(&mut other.partial));
        Ok(())
    }

    /// Sends a script.
    ///
    /// # Errors
    ///
    /// QEMU has ended.
    pub(super) fn send(&mut self, script: &str) -> Result<Job> {
        self.last_job += 1;
        let number = self.last_job;
        let message = message(number, script)?;
        self.jobs.insert(number, Progress::default());
        self.stream.write_all(message.as_bytes()).context("cannot send a script to the guest")?;
        Ok(Job(number))
    }

    /// Starts a shell for a person on the serial port, and returns the port. `size` is "ROWS COLUMNS". No script runs after
    /// that.
    ///
    /// # Errors
    ///
    /// QEMU has ended.
    pub(super) fn start_shell(&mut self, size: &str, terminal: &str) -> Result<UnixStream> {
        self.stream.write_all(format!("shell {size} {terminal}\n").as_bytes()).context("cannot start a shell")?;
        self.stream.set_read_timeout(None).context("cannot set a time-out")?;
        self.stream.try_clone().context("cannot share the port")
    }

    /// The number of boots of the guest on this connection.
    pub(super) fn boots(&self) -> u32 {
        self.boots
    }

    /// Takes the output of an ended script. `None`: the script still runs.
    pub(super) fn take_ended(&mut self, job: Job) -> Option<JobOutput> {
        let status = self.jobs.get(&job.0)?.status?;
        self.jobs.remove(&job.0).map(|progress| JobOutput { text: progress.text, status })
    }

    /// Whether a script has ended.
    pub(super) fn has_ended(&self, job: Job) -> bool {
        self.jobs.get(&job.0).is_none_or(|progress| progress.status.is_some())
    }

    /// The output of a script so far.
    pub(super) fn output_so_far(&self, job: Job) -> &str {
        self.jobs.get(&job.0).map_or("", |progress| &progress.text)
    }

    /// The last lines of any kind.
    pub(super) fn tail(&self) -> impl Iterator<Item = &str> {
        self.tail.iter().map(String::as_str)
    }

    /// Reads the next bytes, and waits a while for them. Returns false at the end of the connection.
    ///
    /// # Errors
    ///
    /// Reading fails.
    pub(super) fn pump(&mut self, wait: Duration) -> Result<bool> {
        self.stream.set_read_timeout(Some(wait)).context("cannot set a time-out")?;
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.take(&bytes[..count]);
                Ok(true)
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) =>
            {
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(error).context("cannot read from the guest"),
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                self.partial.push(*byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.partial).trim_end_matches('\r').to_owned();
            self.partial.clear();
            if !line.is_empty() {
                self.line(&line);
                self.tail.push_back(line);
                if self.tail.len() > TAIL_LINES {
                    self.tail.pop_front();
                }
            }
        }
    }

    fn line(&mut self, line: &str) {
        if line.starts_with("ready ") {
            // All earlier scripts have ended with that boot.
            self.boots += 1;
            self.jobs.clear();
        } else if let Some((number, text)) = numbered(line, '|') {
            if let Some(progress) = self.jobs.get_mut(&number) {
                progress.text.push_str(text);
                progress.text.push('\n');
            }
        } else if let Some((number, status)) = numbered(line, '=') {
            if let Some(progress) = self.jobs.get_mut(&number) {
                progress.status = status.parse().ok();
            }
        }
    }
}

/// The script between its two marks.
fn message(number: u32, script: &str) -> Result<String> {
    let end = format!("end {number}");
    ensure!(script.lines().all(|line| line != end), "a script has the line {end:?}, which ends it");
    Ok(format!("run {number}\n{script}\n{end}\n"))
}

fn numbered(line: &str, separator: char) -> Option<(u32, &str)> {
    let (number, rest) = line.split_once(separator)?;
    Some((number.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent() -> (UnixStream, Agent) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("agent");
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        let agent = Agent::connect(&path).expect("a connection");
        (listener.accept().expect("a client").0, agent)
    }

    #[test]
    fn the_agent_keeps_output_and_status_of_parallel_scripts_apart() {
        let (mut guest, mut agent) = agent();
        let (one, two) = (agent.send("echo 1").expect("sent"), agent.send("echo 2; exit 3").expect("sent"));
        let mut sent = [0; 64];
        let count = guest.read(&mut sent).expect("the scripts");
        assert_eq!(&sent[..count], b"run 1\necho 1\nend 1\nrun 2\necho 2; exit 3\nend 2\n");

        guest.write_all(b"2|to=be\n1|a|b\r\n\n2=3\n1|half").expect("sent");
        assert!(agent.pump(Duration::from_secs(5)).expect("a read"));
        let ended = JobOutput { text: "to=be\n".to_owned(), status: 3 };
        assert_eq!((agent.take_ended(one), agent.take_ended(two)), (None, Some(ended)));
        assert_eq!(agent.output_so_far(one), "a|b\n");

        guest.write_all(b" a line\n1=0\n").expect("sent");
        assert!(agent.pump(Duration::from_secs(5)).expect("a read"));
        let ended = JobOutput { text: "a|b\nhalf a line\n".to_owned(), status: 0 };
        assert_eq!(agent.take_ended(one), Some(ended));
        drop(guest);
        assert!(!agent.pump(Duration::from_secs(5)).expect("the end"));
    }

    #[test]
    fn a_script_ends_with_the_boot_that_ran_it() {
        let (mut guest, mut agent) = agent();
        let job = agent.send("sleep 1000").expect("sent");
        guest.write_all(b"ready 6.12\n1=0\n").expect("sent");
        assert!(agent.pump(Duration::from_secs(5)).expect("a read"));
        assert_eq!((agent.boots(), agent.take_ended(job)), (1, None));
    }

    #[test]
    fn a_script_cannot_have_its_own_end_mark() {
        assert!(message(7, "echo end 7\nend 8").is_ok());
        assert!(message(7, "cat <<x\nend 7\nx").is_err());
    }
}
