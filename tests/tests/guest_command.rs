//! `cargo xtask guest`. The tests run the program that the task builds: the task would build it again, and the programs of
//! other tests with it.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    harness::{self, test},
    linux_guest::on_rings,
};
use rustix::process::{Pid, Signal, kill_process};

const PROGRAM: &str = env!("CARGO_BIN_EXE_guest");
/// How long the program may take to end after a signal.
const END_LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    harness::run(vec![
        test("the_guest_command_runs_a_script_on_rings_and_ends_with_its_status", on_rings::needs(), script),
        test("ctrl_c_ends_the_guest_command_with_all_that_it_has_started_and_made", on_rings::needs(), ctrl_c),
    ])
}

/// Directories for everything that the program makes, and a script.
struct Run {
    // On a disk, not on tmpfs: the disk of the guest is here.
    directory: tempfile::TempDir,
}

impl Run {
    fn new(script: &str) -> Result<Self> {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        for name in ["disks", "files"] {
            fs::create_dir(directory.path().join(name))?;
        }
        fs::write(directory.path().join("script"), script)?;
        Ok(Self { directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("--script").arg(self.path("script"));
        command.env("TMPDIR", self.path("files")).env("RINGPASS_TEST_DISK_DIR", self.path("disks"));
        command
    }

    /// Checks that the program has left nothing behind.
    fn check_empty(&self) -> Result<()> {
        for name in ["disks", "files"] {
            let left: Vec<_> = fs::read_dir(self.path(name))?.flatten().map(|entry| entry.path()).collect();
            ensure!(left.is_empty(), "left behind: {left:?}");
        }
        Ok(())
    }
}

fn script() -> Result<()> {
    let run = Run::new(
        "set -e
        cat /sys/block/vda/ringpass/queue[12]/mode
        dd if=/dev/urandom of=/tmp/written bs=64k count=16 2>/dev/null
        dd if=/tmp/written of=/dev/vda bs=64k oflag=direct 2>/dev/null
        dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null | cmp - /tmp/written
        rings
        exit 7",
    )?;
    let output = run.command().output().context("cannot start the program")?;
    let (said, progress) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let all = format!("{}\n{said}\n{progress}", output.status);
    ensure!(output.status.code() == Some(7), "{all}");
    ensure!(said.starts_with("ring\nring\nqueue  mode "), "{all}");
    ensure!(over_rings(&said) >= 32, "{all}");
    ensure!(progress.contains("the guest is up"), "{all}");
    run.check_empty()
}

/// The sum of a column of the table of the queues.
fn over_rings(table: &str) -> u64 {
    let rows = table.lines().filter_map(|line| line.split_once(" ring "));
    rows.filter_map(|(_, columns)| columns.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

fn ctrl_c() -> Result<()> {
    let run = Run::new("echo started\nsleep 1000")?;
    let mut program = run.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut said = String::new();
    BufReader::new(program.stdout.take().context("its stdout is piped")?).read_line(&mut said)?;
    let started = children(program.id())?;
    let sent = kill_process(Pid::from_child(&program), Signal::INT);
    let ended = end(&mut program)?;
    let mut progress = String::new();
    program.stderr.take().context("its stderr is piped")?.read_to_string(&mut progress)?;
    ensure!(said == "started\n", "{said}\n{progress}");
    sent?;
    ensure!(ended == Some(130) && progress.ends_with("ended by signal 2\n"), "{ended:?}: {progress}");
    ensure!(started.len() == 2, "a broker and QEMU: {started:?}");
    for pid in started {
        ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "the process {pid} is left\n{progress}");
    }
    run.check_empty()
}

fn children(pid: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("children"))?;
        children.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(children)
}

/// Waits for the end of the program, and kills the program if it does not end.
fn end(program: &mut Child) -> Result<Option<i32>> {
    let end = Instant::now() + END_LIMIT;
    while Instant::now() < end {
        if let Some(status) = program.try_wait()? {
            return Ok(status.code());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    program.kill()?;
    program.wait()?;
    Ok(None)
}
