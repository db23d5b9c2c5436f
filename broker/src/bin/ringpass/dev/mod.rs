//! `ringpass dev`: what the served devices of this machine are and do.

mod client;
mod print;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use ringpass_broker::control::{DeviceStats, DeviceStatus};
use ringpass_broker::printable::{Chain, printable};
use serde::Serialize;

use client::{Devices, Found, Gone};

/// Look at the devices that `ringpass serve` serves.
#[derive(Debug, Args)]
pub(crate) struct DevCommand {
    #[command(subcommand)]
    action: Action,
    /// Print JSON.
    #[arg(short, long, global = true)]
    json: bool,
    /// Print JSON for people.
    #[arg(short, long, global = true)]
    pretty: bool,
    /// Where the control sockets are [default: $RUNTIME_DIRECTORY, /run/ringpass for root, $XDG_RUNTIME_DIR/ringpass].
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the devices.
    List,
    /// Show how a device is set up, who executes each queue, and why not the kernel.
    Show {
        /// Name of the device, or path of its control socket. Without it: all.
        device: Option<String>,
    },
    /// Count what a device has done.
    Stats {
        /// Name of the device, or path of its control socket.
        device: String,
        /// Count again and again, and show what was done since the last time, per second. A device that is gone is waited for.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = seconds)]
        watch: Option<f64>,
    },
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
/// There is no such device, or it does not answer.
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
    }
    Ok(ExitCode::SUCCESS)
}

/// All devices; of those without an answer, why.
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

/// Runs until the user ends it, and waits for a device that is gone.
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
                    note(&format!("{}; waiting for it", Chain(error.as_ref())));
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

/// Tells of something that is no result.
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
            // The reader has seen enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => bail!("nobody reads any more"),
            written => written.context("cannot write"),
        }
    }
}
