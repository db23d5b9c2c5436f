//! Finds devices and asks them.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use ringpass_broker::control::DeviceStatus;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::runtime_dir::{self, SUFFIX};

/// How long a device may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The control sockets in a directory.
pub(super) struct Devices {
    directory: PathBuf,
}

/// A control socket.
#[derive(Debug, Serialize)]
pub(super) struct Found {
    /// The device's name.
    pub(super) name: String,
    /// Its process. None: nobody answers there any more.
    pub(super) pid: Option<u32>,
    /// Its disk.
    pub(super) disk: Option<String>,
    /// The socket.
    pub(super) socket: PathBuf,
}

impl Devices {
    pub(super) fn new(directory: Option<PathBuf>) -> anyhow::Result<Self> {
        let directory = directory.or_else(runtime_dir::for_this_user);
        Ok(Self { directory: directory.context("no --runtime-dir, and XDG_RUNTIME_DIR is not set")? })
    }

    /// All of them, by name.
    pub(super) fn list(&self) -> anyhow::Result<Vec<Found>> {
        let mut found = Vec::new();
        for name in self.names()? {
            let socket = self.socket(&name);
            let status: Option<DeviceStatus> = ask(&socket, "show").ok();
            let (pid, disk) = status.map(|status| (status.pid, status.disk.path)).unzip();
            found.push(Found { name, pid, disk, socket });
        }
        Ok(found)
    }

    /// Asks a device, by its name or by the path of its socket.
    pub(super) fn ask<T: DeserializeOwned>(&self, device: &str, request: &str) -> anyhow::Result<T> {
        if device.contains('/') {
            return ask(Path::new(device), request);
        }
        let names = self.names()?;
        if !names.iter().any(|name| name == device) {
            let others = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            bail!("no device {device} in {}; there are: {others}", self.directory.display());
        }
        ask(&self.socket(device), request)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}{SUFFIX}"))
    }

    fn names(&self) -> anyhow::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("looking into {}", self.directory.display()))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.context("looking for devices")?.file_name();
            names.extend(name.to_str().and_then(|name| name.strip_suffix(SUFFIX)).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }
}

fn ask<T: DeserializeOwned>(socket: &Path, request: &str) -> anyhow::Result<T> {
    let talking = || format!("asking the device at {}", socket.display());
    let stream = UnixStream::connect(socket).with_context(talking)?;
    stream.set_read_timeout(Some(PATIENCE)).with_context(talking)?;
    let question = serde_json::json!({ "request": request });
    (&stream).write_all(format!("{question}\n").as_bytes()).with_context(talking)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).with_context(talking)?;
    let answer: serde_json::Value = serde_json::from_str(&line).with_context(talking)?;
    if let Some(error) = answer.get("error").and_then(serde_json::Value::as_str) {
        bail!("the device at {}: {error}", socket.display());
    }
    serde_json::from_value(answer).with_context(talking)
}
