//! The files that `ringpass-dd` reads and writes. It never overwrites the disk itself, and it says so when an input has
//! another length than the disk.

use std::{
    fs,
    io::Write,
    os::unix::fs::symlink,
    process::{Command, ExitCode, Output, Stdio},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::BrokerProcess,
    canaries::pattern,
    dd::{self, DISK_BYTES, Place, status_is, text},
    disks::DiskKind,
    front_end::rig::Rig,
    harness::{self, test},
};

const MIB: u64 = 1 << 20;

fn main() -> ExitCode {
    let with_loop = || DiskKind::Loop.needs().into_iter().chain(dd::needs());
    harness::run(vec![
        test("read_refuses_an_output_that_is_the_disk_under_every_name", dd::needs(), same_file),
        test("read_refuses_an_output_that_is_the_disk_on_another_layer", with_loop(), same_disk),
        test("write_and_verify_say_that_the_input_has_another_length_than_the_disk", dd::needs(), lengths),
    ])
}

fn refused(output: &Output) -> Result<()> {
    status_is(output, 2)?;
    ensure!(text(output).contains("is in use") && text(output).contains("give another --output"), "{}", text(output));
    Ok(())
}

fn same_file() -> Result<()> {
    for arguments in [&["--num-queues", "2"][..], &["--num-queues", "2", "--read-only"]] {
        let place = Place::new(&["--num-queues", "2"])?;
        let content = pattern(1, usize::try_from(DISK_BYTES)?);
        place.succeed(&["write", "--input", &place.file("in", &content)?])?;
        let Place { rig, broker } = place;
        drop(broker);
        let broker = rig.broker(arguments)?;
        let place = Place { rig, broker };
        // A link needs the same file system.
        let hard_link = place.rig.disk().path().with_extension("link");
        let soft_link = place.path("soft");
        fs::hard_link(place.rig.disk().path(), &hard_link)?;
        symlink(place.rig.disk().path(), &soft_link)?;
        for output in [place.rig.disk().path(), &hard_link, &soft_link] {
            let output = output.to_str().context("a path in UTF-8")?;
            for sparse in [&[][..], &["--sparse"]] {
                refused(&place.run(&[&["read", "--output", output], sparse].concat())?)?;
            }
        }
        // The disk is standard output, which the shell has not truncated.
        let disk = fs::File::options().write(true).open(place.rig.disk().path())?;
        refused(&place.command(&["read", "--output", "-"])?.stdout(disk).output()?)?;
        ensure!(place.disk()? == content, "the disk was changed");
        fs::remove_file(&hard_link)?;
        // Another file, which is longer than the disk.
        let output = place.file("out", &vec![7; content.len() + 5])?;
        place.succeed(&["read", "--output", &output])?;
        ensure!(fs::read(&output)? == content, "the copy has other data than the disk");
    }
    Ok(())
}

/// A loop device over a file. The drop detaches it.
struct LoopDevice(String);

impl LoopDevice {
    fn new(file: &str) -> Result<Self> {
        let output = Command::new("losetup").args(["--find", "--show", file]).output()?;
        ensure!(output.status.success(), "losetup: {}", text(&output));
        Ok(Self(String::from_utf8(output.stdout)?.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

fn same_disk() -> Result<()> {
    // The server serves a file, and the output is a loop device over it.
    let place = Place::new(&["--num-queues", "2"])?;
    let content = pattern(2, usize::try_from(DISK_BYTES)?);
    place.succeed(&["write", "--input", &place.file("in", &content)?])?;
    let device = LoopDevice::new(place.rig.disk().path().to_str().context("a path in UTF-8")?)?;
    refused(&place.run(&["read", "--output", &device.0])?)?;
    ensure!(place.disk()? == content, "the disk was changed");
    drop(device);
    drop(place);

    // The server serves a loop device, read-write and read-only. The output is the file behind it, or the device
    // itself.
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    fs::write(rig.disk().path(), &content)?;
    let file = rig.disk().path().to_str().context("a path in UTF-8")?;
    for arguments in [&["--num-queues", "2"][..], &["--num-queues", "2", "--read-only"]] {
        let device = LoopDevice::new(file)?;
        let _broker = BrokerProcess::start(&rig.socket(), device.0.as_ref(), arguments)?;
        for output in [file, &device.0] {
            refused(&dd::command(&rig.socket(), &["read", "--output", output])?.output()?)?;
        }
        ensure!(fs::read(file)? == content, "the disk was changed");
    }
    Ok(())
}

fn lengths() -> Result<()> {
    let place = Place::new(&["--num-queues", "2"])?;
    let half = place.file("half", &pattern(3, usize::try_from(DISK_BYTES / 2)?))?;
    let remark = format!("half has {} bytes: the {} bytes of the disk after them ", DISK_BYTES / 2, DISK_BYTES / 2);
    let says = |output: &Output, words: &str| {
        ensure!(text(output).contains(words), "{words:?} is missing in: {}", text(output));
        Ok(())
    };
    says(&place.succeed(&["write", "--input", &half])?, &format!("{remark}stay unchanged"))?;
    says(&place.succeed(&["verify", "--input", &half])?, &format!("{remark}are not compared"))?;
    let asked = place.succeed(&["write", "--input", &half, "--length-bytes", "4096"])?;
    ensure!(
        !text(&asked).contains("bytes of the disk after"),
        "it remarks on a length that the command line asks for: {}",
        text(&asked)
    );

    // The program knows the length of a pipe only at its end.
    let piped = |command: &str, bytes: &[u8]| -> Result<Output> {
        let mut child = place.command(&[command, "--input", "-"])?.stdin(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("it is piped")?;
        // The program may have stopped reading.
        let _ = stdin.write_all(bytes);
        drop(stdin);
        Ok(child.wait_with_output()?)
    };
    let long = pattern(4, usize::try_from(DISK_BYTES + MIB)?);
    let (disk, short) = (&long[..usize::try_from(DISK_BYTES)?], &long[..usize::try_from(MIB)?]);
    let output = piped("write", &long)?;
    status_is(&output, 2)?;
    says(&output, &format!("standard input is longer than the disk: the disk has {DISK_BYTES} bytes"))?;
    ensure!(place.disk()? == disk, "the part that fits was not written");
    let output = piped("write", short)?;
    status_is(&output, 0)?;
    says(
        &output,
        &format!("standard input has {MIB} bytes: the {} bytes of the disk after them stay", DISK_BYTES - MIB),
    )?;
    status_is(&piped("write", disk)?, 0)?;

    let output = piped("verify", disk)?;
    status_is(&output, 0)?;
    ensure!(text(&output).lines().count() == 1, "{}", text(&output));
    let output = piped("verify", short)?;
    status_is(&output, 0)?;
    says(
        &output,
        &format!("standard input has {MIB} bytes: the {} bytes of the disk after them are not", DISK_BYTES - MIB),
    )?;
    let output = piped("verify", &long)?;
    status_is(&output, 2)?;
    says(
        &output,
        &format!("standard input is longer than the {DISK_BYTES} bytes compared with it: these are the same"),
    )?;
    let mut child =
        place.command(&["verify", "--input", "-", "--length-bytes", "2MiB"])?.stdin(Stdio::piped()).spawn()?;
    child.stdin.take().context("it is piped")?.write_all(short)?;
    let output = child.wait_with_output()?;
    status_is(&output, 2)?;
    says(&output, &format!("standard input ended after {MIB} bytes, before the end of the range to compare"))?;
    let mut other = short.to_vec();
    other[77] ^= 1;
    let output = piped("verify", &other)?;
    status_is(&output, 1)?;
    says(&output, "in 1 bytes; the first is at byte 77 of the disk")
}
