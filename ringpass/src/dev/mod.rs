//! `ringpass dev`: status and statistics of the served devices of this machine.

mod client;
mod print;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use ringpass_broker::control::{DeviceStats, DeviceStatus, ModeReport};
use ringpass_broker::printable::{Chain, printable};
use serde::Serialize;

use client::{Devices, Found, Gone};

/// Inspect the devices that `ringpass serve` serves, and change their mode.
#[derive(Debug, Args)]
pub(crate) struct DevCommand {
    #[command(subcommand)]
    action: Action,
    /// Print JSON.
    #[arg(short, long, global = true)]
    json: bool,
    /// Print indented JSON.
    #[arg(short, long, global = true)]
    pretty: bool,
    /// Directory of the control sockets [default: $RUNTIME_DIRECTORY, /run/ringpass for root,
    /// $XDG_RUNTIME_DIR/ringpass].
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the devices.
    List,
    /// Show how a device is set up, what executes each queue, and why a queue has no ring.
    Show {
        /// Name of the device, or path of its control socket. Default: all devices.
        device: Option<String>,
    },
    /// Show the counters of a device.
    Stats {
        /// Name of the device, or path of its control socket.
        device: String,
        /// Read the counters at this interval, and show the rates per second. If the device is gone, wait until it is
        /// back.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = seconds)]
        watch: Option<f64>,
    },
    /// Change a setting of a device that runs.
    Set {
        /// Name of the device, or path of its control socket.
        device: String,
        #[command(subcommand)]
        setting: Setting,
    },
}

#[derive(Debug, Subcommand)]
enum Setting {
    /// Decide whether queues whose drivers ask for rings have them. The mode lasts until the server ends.
    Mode {
        #[arg(value_enum)]
        mode: ModeArg,
        /// How long the guest's driver may take to leave its rings. If it takes longer, the mode stays as it was.
        #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
        timeout: f64,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModeArg {
    /// Drivers may ask for rings.
    Auto,
    /// All queues are virtqueues: drivers are asked to leave their rings, and no request is lost.
    Virtqueue,
}

impl ModeArg {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Virtqueue => "virtqueue",
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be a number from 0.1 to 3600".into()),
    }
}

/// Runs `ringpass dev`.
///
/// # Errors
///
/// The device does not exist, or does not answer.
pub(crate) fn run(command: &DevCommand) -> anyhow::Result<ExitCode> {
    let devices = Devices::new(command.runtime_dir.clone())?;
    match &command.action {
        Action::List => {
            let found = devices.list()?;
            command.print(&found, || print::list(&found))?;
        }
        Action::Show { device: Some(device) } => {
            let status: DeviceStatus = devices.ask(device, "show")?;
            command.print(&status, || print::show(&status))?;
        }
        Action::Show { device: None } => return show_all(command, &devices),
        Action::Stats { device, watch: None } => {
            let stats: DeviceStats = devices.ask(device, "stats")?;
            command.print(&stats, || print::stats(&stats))?;
        }
        Action::Stats { device, watch: Some(seconds) } => watch(command, &devices, device, *seconds)?,
        Action::Set { device, setting: Setting::Mode { mode, timeout } } => {
            let report: ModeReport = devices.set_mode(device, mode.name(), Duration::from_secs_f64(*timeout))?;
            command.print(&report, || print::mode(device, &report))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows all devices, or why a device does not answer.
fn show_all(command: &DevCommand, devices: &Devices) -> anyhow::Result<ExitCode> {
    let (mut all, mut text) = (Vec::new(), Vec::new());
    let mut is_complete = true;
    for found in devices.list()? {
        let status = match found {
            Found { pid: None, error: None, name, .. } => Err(format!("{name}: gone")),
            Found { error: Some(error), name, .. } => Err(format!("{name}: {error}")),
            Found { name, .. } => match devices.ask::<DeviceStatus>(&name, "show") {
                Err(error) if error.is::<Gone>() => Err(format!("{name}: gone")),
                Err(error) => Err(format!("{name}: {}", Chain(error.as_ref()))),
                Ok(status) => Ok(status),
            },
        };
        match status {
            Ok(status) => {
                text.push(print::show(&status));
                all.push(status);
            }
            Err(why) => {
                is_complete &= why.ends_with(": gone");
                text.push(format!("{why}\n"));
            }
        }
    }
    command.print(&all, || text.join("\n"))?;
    Ok(if is_complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Shows rates until the user ends the program. Waits for a device that is gone.
fn watch(command: &DevCommand, devices: &Devices, device: &str, seconds: f64) -> anyhow::Result<()> {
    let mut before: DeviceStats = devices.ask(device, "stats")?;
    let mut counted_at = Instant::now();
    let mut is_missing = false;
    loop {
        std::thread::sleep(Duration::from_secs_f64(seconds));
        let now: DeviceStats = match devices.ask(device, "stats") {
            Ok(now) => now,
            Err(error) => {
                if !std::mem::replace(&mut is_missing, true) {
                    note(&format!("{}; waiting for the device", Chain(error.as_ref())));
                }
                continue;
            }
        };
        if std::mem::take(&mut is_missing) {
            note(&format!("{} is back", printable(device)));
        }
        command.print(&now, || print::rates(&before, &now, counted_at.elapsed()))?;
        (before, counted_at) = (now, Instant::now());
    }
}

/// Prints a note to standard error.
fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "ringpass: {line}");
}

impl DevCommand {
    fn print(&self, value: &impl Serialize, table: impl FnOnce() -> String) -> anyhow::Result<()> {
        let text = match (self.json, self.pretty) {
            (_, true) => serde_json::to_string_pretty(value)? + "\n",
            (true, false) => serde_json::to_string(value)? + "\n",
            (false, false) => table(),
        };
        match std::io::stdout().write_all(text.as_bytes()) {
            // The reader has closed the pipe, which also ends `--watch`.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                bail!("the reader of standard output is gone")
            }
            written => written.context("cannot write the result"),
        }
    }
}
