//! QEMU accepts the command lines of the documentation. The tests run the QEMU of this machine and a server.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    harness::{self, test},
    needs::{Need, find_program},
};

const QEMU: &str = "qemu-system-x86_64";
/// The option to reconnect: before QEMU 9.2, and from 9.2 on. The documentation shows the newer one and names the older
/// one.
const RECONNECT: [&str; 2] = ["reconnect=1", "reconnect-ms=1000"];

fn main() -> ExitCode {
    let needs = || broker_process::needs().into_iter().chain([Need::program(QEMU, "qemu-system-x86")]);
    harness::run(vec![
        test("qemu_takes_the_command_line_of_the_readme", needs(), || runs(&document("README.md")?)),
        test("qemu_takes_the_command_line_of_the_document_on_running", needs(), || runs(&document("docs/running.md")?)),
        test("qemu_takes_the_command_line_of_the_document_on_linux_guests", needs(), || {
            runs(&document("docs/linux-guest.md")?)
        }),
        test("qemu_takes_the_options_that_serve_help_shows", needs(), || runs(&help()?)),
    ])
}

/// The QEMU command of a document of the repository.
fn document(name: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let command = text.split_once("$ qemu-system-x86_64 ").with_context(|| format!("{name} shows no command"))?.1;
    let (command, explained) = command.split_once(" ...\n```\n").context("the command has no end")?;
    ensure!(
        RECONNECT.iter().all(|option| explained.contains(option)),
        "{name} does not name the options of both versions"
    );
    Ok(command.replace("\\\n", " ").replace("/run/vm1.sock", "PATH"))
}

/// The options at the end of `ringpass serve --help`.
fn help() -> Result<String> {
    let output = Command::new(broker_process::program()?).args(["serve", "--help"]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let (title, options) = text
        .split_once("QEMU 9.2 and later")
        .and_then(|(_, rest)| rest.split_once('\n'))
        .context("no QEMU in --help")?;
    ensure!(
        RECONNECT.iter().all(|option| title.contains(option)),
        "--help does not name the options of both versions: {title}"
    );
    let options = options.replace("SIZE", "256M").replace("MACHINE", "q35").replace("num-queues=N", "num-queues=2");
    Ok(options + " -machine accel=kvm")
}

/// Starts QEMU with these options and the disk of a real server, and ends it. The guest does not run.
fn runs(options: &str) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (socket, image) = (directory.path().join("vm.sock"), directory.path().join("disk.img"));
    File::create(&image)?.set_len(1 << 20)?;
    let mut server = BrokerProcess::start(&socket, &image, &[])?;

    let qemu = find_program(QEMU).context("no QEMU")?;
    ensure!(options.contains(RECONNECT[1]), "the newer option is shown: {options}");
    let options = options.replace(RECONNECT[1], RECONNECT[usize::from(is_from_9_2(&qemu)?)]);
    let options = options.replace("PATH", socket.to_str().context("a path in UTF-8")?);
    let accelerator = if Path::new("/dev/kvm").exists() { "accel=kvm" } else { "accel=tcg" };
    let options = options.replace("accel=kvm", accelerator);
    let mut command = Command::new(qemu);
    command.args(options.split_whitespace()).args(["-S", "-nodefaults", "-display", "none", "-monitor", "stdio"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start QEMU")?;
    // QEMU fails before it reads this if it refuses an option or the device.
    let _ = child.stdin.take().context("its stdin is piped")?.write_all(b"quit\n");
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "QEMU refuses {options:?}: {said}");
    ensure!(!said.contains("deprecated"), "QEMU warns about {options:?}: {said}");
    server.wait_for_log("front-end")?;
    server.terminate()?;
    Ok(())
}

/// Whether this QEMU has `reconnect-ms`.
fn is_from_9_2(qemu: &PathBuf) -> Result<bool> {
    let output = Command::new(qemu).arg("--version").output()?;
    let text = String::from_utf8(output.stdout)?;
    let version = text.split_once("version ").context("no version")?.1;
    let mut parts = version.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let mut part = || parts.next().context("a version has two parts")?.context("a version has numbers");
    Ok((part()?, part()?) >= (9, 2))
}
