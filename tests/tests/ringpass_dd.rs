//! `ringpass-dd`, the example of the user-space driver, as a user runs it.

use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    process::{Child, Command, ExitCode, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use ringpass_tests::{
    canaries::pattern,
    dd::{self, Place, status_is, text},
    harness::{self, test},
};
use rustix::process::{Pid, Signal, kill_process};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = dd::DISK_BYTES;
/// The most that an end takes that waits for nothing.
const PROMPT: Duration = Duration::from_secs(10);
const BROKER_ARGUMENTS: [&str; 4] = ["--mode", "direct", "--num-queues", "5"];

fn main() -> ExitCode {
    let needs = dd::needs;
    harness::run(vec![
        test("a_copy_reads_back_what_it_wrote_in_every_way", needs(), every_way),
        test("verify_finds_a_flipped_byte_and_says_where_it_is", needs(), flipped_byte),
        test("a_copy_takes_pipes_and_parts_of_the_disk", needs(), pipes),
        test("a_sparse_copy_turns_zeroes_into_holes_on_both_ends", needs(), holes),
        test("a_refused_copy_says_why_and_changes_nothing", needs(), refusals),
        test("a_copy_survives_killed_servers", needs(), killed_servers),
        test("an_interrupted_copy_ends_and_says_how_far_it_came", needs(), interrupted),
        test("a_copy_gives_up_on_a_server_that_does_not_come_back", needs(), lost_server),
    ])
}

fn content(seed: u64) -> Result<Vec<u8>> {
    Ok(pattern(seed, usize::try_from(DISK_BYTES)?))
}

fn every_way() -> Result<()> {
    let place = Place::new(&BROKER_ARGUMENTS)?;
    let output = place.path("out").display().to_string();
    let mut seed = 0;
    for way in ["ring", "virtqueue"] {
        for wait in ["interrupt", "poll"] {
            for (queues, depth, block) in [("1", "1", "1MiB"), ("4", "16", "256KiB"), ("2", "128", "4096")] {
                seed += 1;
                let content = content(seed)?;
                let input = place.file("in", &content)?;
                let how = ["--way", way, "--wait", wait, "--queues", queues, "--depth", depth, "--block-bytes", block];
                let written = place.succeed(&[&["write", "--input", &input, "--verify"], &how[..]].concat())?;
                let word = if way == "ring" { "queue 1 is a ring (epoch 1)" } else { "queue 1 is a virtqueue" };
                ensure!(text(&written).contains(word), "{}", text(&written));
                ensure!(place.disk()? == content, "the disk has other data: {how:?}");
                place.succeed(&[&["read", "--output", &output], &how[..]].concat())?;
                ensure!(fs::read(&output)? == content, "the copy has other data than the disk: {how:?}");
            }
        }
    }
    Ok(())
}

fn flipped_byte() -> Result<()> {
    let place = Place::new(&BROKER_ARGUMENTS)?;
    let mut content = content(7)?;
    let input = place.file("in", &content)?;
    place.succeed(&["write", "--input", &input])?;
    place.succeed(&["verify", "--input", &input])?;
    for at in [12_345_678, 30_000_000] {
        content[at] ^= 0x10;
    }
    let input = place.file("in", &content)?;
    let output = place.run(&["verify", "--input", &input, "--queues", "3"])?;
    status_is(&output, 1)?;
    let expected = format!(
        "in 2 bytes; the first is at byte 12345678 of the disk: the disk has {:#04x}",
        content[12_345_678] ^ 0x10
    );
    ensure!(text(&output).contains(&expected), "{}", text(&output));
    Ok(())
}

fn pipes() -> Result<()> {
    let place = Place::new(&BROKER_ARGUMENTS)?;
    let (before, part) = (content(1)?, pattern(2, 3 << 20));
    let input = place.file("in", &before)?;
    place.succeed(&["write", "--input", &input])?;
    let mut child =
        place.command(&["write", "--input", "-", "--offset-bytes", "5MiB"])?.stdin(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("it is piped")?;
    for piece in part.chunks(77_777) {
        stdin.write_all(piece)?;
    }
    drop(stdin);
    status_is(&child.wait_with_output()?, 0)?;
    let read = place.succeed(&["read", "--output", "-", "--offset-bytes", "5MiB", "--length-bytes", "3MiB"])?;
    ensure!(read.stdout == part, "the copy has other data than the disk");
    let mut expected = before;
    expected[5 << 20..8 << 20].copy_from_slice(&part);
    ensure!(place.disk()? == expected, "something else was written");
    Ok(())
}

fn holes() -> Result<()> {
    let place = Place::new(&BROKER_ARGUMENTS)?;
    let mut sparse = content(3)?;
    let input = place.file("in", &sparse)?;
    place.succeed(&["write", "--input", &input])?;
    sparse[4 << 20..40 << 20].fill(0);
    let input = place.file("in", &sparse)?;
    let blocks = || Ok::<u64, anyhow::Error>(place.rig.disk_file()?.metadata()?.blocks());
    let before = blocks()?;
    place.succeed(&["write", "--input", &input, "--sparse", "--verify"])?;
    ensure!(place.disk()? == sparse, "the disk has other data");
    ensure!(blocks()? * 512 < before * 512 - 30 * MIB, "the disk still has {} blocks of {before}", blocks()?);
    let output = place.path("out");
    place.succeed(&["read", "--output", &output.display().to_string(), "--sparse"])?;
    ensure!(fs::read(&output)? == sparse, "the copy has other data than the disk");
    ensure!(fs::metadata(&output)?.blocks() * 512 < 20 * MIB, "no holes");
    Ok(())
}

fn refusals() -> Result<()> {
    let place = Place::new(&BROKER_ARGUMENTS)?;
    let content = content(4)?;
    let input = place.file("in", &content)?;
    place.succeed(&["write", "--input", &input])?;
    let long = place.file("long", &vec![1; usize::try_from(DISK_BYTES)? + 512])?;
    let odd = place.file("odd", &[2; 1000])?;
    let output = place.path("out").display().to_string();
    for (arguments, expected) in [
        (&["write", "--input", &long][..], "do not fit: the disk has 50331648 bytes"),
        (&["write", "--input", &odd], "1000 bytes are no multiple of 512"),
        (&["write", "--input", &input, "--offset-bytes", "1MiB"], "do not fit"),
        (&["write", "--input", &odd, "--offset-bytes", "7"], "--offset-bytes: 7 bytes are no multiple of 512"),
        (&["write", "--input", &odd, "--length-bytes", "2048"], "has 1000 bytes, fewer than --length-bytes 2048"),
        (&["write", "--input", "-", "--verify"], "--verify reads the input twice"),
        (&["write", "--input", "nowhere"], "cannot open nowhere"),
        (
            &["write", "--input", &input, "--block-bytes", "1000"],
            "must be a multiple of the disk's block size, 512 bytes",
        ),
        (&["write", "--input", &input, "--block-bytes", "1GiB"], "at most 4 MiB"),
        (&["read", "--output", &output, "--offset-bytes", "48MiB"], "is not before the end of the disk"),
        (&["read", "--output", "-", "--sparse"], "--sparse leaves holes, but only a file can have holes"),
    ] {
        let output = place.run(arguments)?;
        status_is(&output, 2).with_context(|| format!("{arguments:?}"))?;
        ensure!(text(&output).contains(expected), "{arguments:?}: {}", text(&output));
        ensure!(text(&output).lines().count() == 1, "not one line: {}", text(&output));
    }
    ensure!(place.disk()? == content, "something was written");
    ensure!(!place.path("out").exists(), "a file was made");
    drop(place);

    let arguments = ["--socket", "no/such.sock", "read", "--output", "-", "--patience-s", "1"];
    let output = Command::new(dd::program()?).args(arguments).output()?;
    status_is(&output, 2)?;
    let (said, advice) = (text(&output), "is `ringpass serve --socket-path` running there?");
    ensure!(
        said.contains("cannot connect to no/such.sock: No such file") && said.trim_end().ends_with(advice),
        "{said}"
    );

    let place = Place::new(&["--read-only", "--num-queues", "2"])?;
    let input = place.file("in", &content)?;
    let output = place.run(&["write", "--input", &input])?;
    status_is(&output, 2)?;
    ensure!(text(&output).contains("the disk is read-only"), "{}", text(&output));
    place.succeed(&["read", "--output", "-"])?;
    let output = place.run(&["read", "--output", "-", "--way", "ring"])?;
    status_is(&output, 2)?;
    ensure!(text(&output).contains("does not offer rings"), "{}", text(&output));
    Ok(())
}

/// A copy that takes a while. Its input comes slowly, and the last piece comes only when the test wants the copy to
/// end.
struct SlowCopy {
    child: Child,
    last_piece: mpsc::Sender<()>,
    input: thread::JoinHandle<()>,
    content: Vec<u8>,
}

impl SlowCopy {
    fn start(place: &Place, arguments: &[&str]) -> Result<Self> {
        let content = content(5)?;
        let arguments = [&["write", "--input", "-"], arguments].concat();
        let mut child = place.command(&arguments)?.stdin(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("it is piped")?;
        let bytes = content.clone();
        let (last_piece, is_wanted) = mpsc::channel();
        let input = thread::spawn(move || {
            let mut pieces = bytes.chunks(1 << 20).peekable();
            while let Some(piece) = pieces.next() {
                if pieces.peek().is_none() {
                    // The drop of the sender releases the last piece.
                    let _ = is_wanted.recv();
                }
                if stdin.write_all(piece).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(40));
            }
        });
        Ok(Self { child, last_piece, input, content })
    }

    /// Waits for the end of the copy. Returns its output, and the content that it had to copy.
    fn end(self) -> Result<(Output, Vec<u8>)> {
        drop(self.last_piece);
        let output = self.child.wait_with_output()?;
        self.input.join().map_err(|_| anyhow!("the input's thread panicked"))?;
        Ok((output, self.content))
    }
}

fn killed_servers() -> Result<()> {
    let mut place = Place::new(&BROKER_ARGUMENTS)?;
    let copy = SlowCopy::start(&place, &["--queues", "2"])?;
    for _ in 0..3 {
        // With this line the copy has found the new server.
        place.broker.wait_for_log(": Open queue=")?;
        place.broker.kill()?;
        place.broker = place.rig.broker(&BROKER_ARGUMENTS)?;
    }
    let (output, content) = copy.end()?;
    place.broker.explain(status_is(&output, 0))?;
    ensure!(place.disk()? == content, "the disk has other data");
    let text = text(&output);
    ensure!(text.contains("server lost: 3 times"), "{text}");
    ensure!(text.contains("the connection to the server was lost and is restored; the copy continues"), "{text}");
    Ok(())
}

fn interrupted() -> Result<()> {
    let place = Place::new(&BROKER_ARGUMENTS)?;
    let copy = SlowCopy::start(&place, &[])?;
    place.broker.wait_for_log("vring starts")?;
    let pid = Pid::from_raw(i32::try_from(copy.child.id())?).context("a process")?;
    kill_process(pid, Signal::INT)?;
    let begin = Instant::now();
    let (output, _) = copy.end()?;
    ensure!(begin.elapsed() < PROMPT, "it ended after {:?}", begin.elapsed());
    status_is(&output, 2)?;
    ensure!(text(&output).contains("ringpass-dd: interrupted after "), "{}", text(&output));
    // The server serves the next front-end.
    place.succeed(&["read", "--output", "-"]).map(drop)
}

fn lost_server() -> Result<()> {
    let mut place = Place::new(&BROKER_ARGUMENTS)?;
    let copy = SlowCopy::start(&place, &["--patience-s", "1"])?;
    place.broker.wait_for_log("vring starts")?;
    place.broker.kill()?;
    let (output, _) = copy.end()?;
    status_is(&output, 2)?;
    ensure!(text(&output).contains("no answer from the server for 1 s"), "{}", text(&output));
    let output = Command::new(dd::program()?)
        .args(["read", "--output", "-", "--patience-s", "1", "--socket"])
        .arg(place.path("none"))
        .output()?;
    status_is(&output, 2)?;
    ensure!(text(&output).contains("is `ringpass serve --socket-path` running there?"), "{}", text(&output));
    Ok(())
}
