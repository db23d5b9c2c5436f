//! The client of the control sockets: finds devices and sends them requests.

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::unistd::{Uid, seteuid};
use ringpass_broker::control::{DeviceStatus, remove_if_stale};
use ringpass_broker::printable::Chain;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::runtime_dir::{self, SUFFIX};

/// Time-out for a device's answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Maximum size of an answer. A device with 256 queues answers with a few hundred KiB at most.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// The control sockets in a directory.
pub(super) struct Devices {
    directory: PathBuf,
}

/// A control socket.
#[derive(Debug, Serialize)]
pub(super) struct Found {
    /// The device's name.
    pub(super) name: String,
    /// The process that serves the device. `None`: the device is gone, or does not answer.
    pub(super) pid: Option<u32>,
    /// The path of the device's disk.
    pub(super) disk: Option<String>,
    /// The control socket. The client removes the socket of a device that is gone.
    pub(super) socket: PathBuf,
    /// Why a device that is not gone did not answer.
    pub(super) error: Option<String>,
}

/// No process listens on the control socket of a device.
#[derive(Debug, thiserror::Error)]
#[error("the device is gone: no process listens on {}: {source}", .socket.display())]
pub(super) struct Gone {
    socket: PathBuf,
    /// The kernel's error: the file does not exist, or no process accepts connections.
    source: io::Error,
}

impl Devices {
    pub(super) fn new(directory: Option<PathBuf>) -> anyhow::Result<Self> {
        let directory = directory.or_else(runtime_dir::for_this_user);
        Ok(Self { directory: directory.context("XDG_RUNTIME_DIR is not set: give --runtime-dir")? })
    }

    /// Lists all devices, sorted by name.
    pub(super) fn list(&self) -> anyhow::Result<Vec<Found>> {
        let mut found = Vec::new();
        for name in self.names()? {
            let socket = self.socket(&name);
            let mut device = Found { name, pid: None, disk: None, socket, error: None };
            match ask::<DeviceStatus>(&device.socket, &serde_json::json!({ "request": "show" }), PATIENCE) {
                Ok(status) => (device.pid, device.disk) = (Some(status.pid), Some(status.disk.path)),
                Err(error) if error.is::<Gone>() => remove(&device.socket),
                Err(error) => device.error = Some(Chain(error.as_ref()).to_string()),
            }
            found.push(device);
        }
        Ok(found)
    }

    /// Sends a request to a device, given by name or by the path of its control socket.
    pub(super) fn ask<T: DeserializeOwned>(&self, device: &str, request: &str) -> anyhow::Result<T> {
        self.send(device, &serde_json::json!({ "request": request }), PATIENCE)
    }

    /// Changes the mode of a device. Drivers have this long to leave their rings.
    pub(super) fn set_mode<T: DeserializeOwned>(
        &self,
        device: &str,
        mode: &str,
        timeout: Duration,
    ) -> anyhow::Result<T> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let request = serde_json::json!({ "request": "set-mode", "mode": mode, "timeout_ms": timeout_ms });
        self.send(device, &request, timeout + PATIENCE)
    }

    fn send<T: DeserializeOwned>(&self, device: &str, request: &Value, patience: Duration) -> anyhow::Result<T> {
        if device.contains('/') {
            return ask(Path::new(device), request, patience);
        }
        let names = self.names()?;
        if !names.iter().any(|name| name == device) {
            let others = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            bail!("no device {device} in {}; devices there are: {others}", self.directory.display());
        }
        ask(&self.socket(device), request, patience)
    }

    /// The control socket of a device: in the directory, or in one of the device's own below it.
    fn socket(&self, name: &str) -> PathBuf {
        let file = format!("{name}{SUFFIX}");
        let own = self.directory.join(name).join(&file);
        let shared = self.directory.join(file);
        if !is_there(&shared) && is_there(&own) { own } else { shared }
    }

    fn names(&self) -> anyhow::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("cannot list {}", self.directory.display()))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.context("cannot list the devices")?.file_name();
            let Some(name) = name.to_str() else { continue };
            match name.strip_suffix(SUFFIX) {
                Some(device) => names.push(device.to_owned()),
                None if is_there(&self.directory.join(name).join(format!("{name}{SUFFIX}"))) => {
                    names.push(name.to_owned());
                }
                None => {}
            }
        }
        names.sort();
        names.dedup();
        Ok(names)
    }
}

fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Removes a control socket that an ended server has left behind.
fn remove(socket: &Path) {
    if let Err(error) = remove_if_stale(socket) {
        tracing::debug!(socket = ?socket, %error, "cannot remove a stale control socket");
    }
}

/// Connects. Root does so as the owner of the socket: a server in a user namespace of its own cannot tell root from
/// other users, and lets its own user change the device.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let owner = Uid::from_raw(fs::symlink_metadata(socket)?.uid());
    if !Uid::effective().is_root() || owner.is_root() {
        return UnixStream::connect(socket);
    }
    // Only the effective user changes, so root has the right to go back.
    seteuid(owner)?;
    let connected = UnixStream::connect(socket);
    seteuid(Uid::from_raw(0))?;
    match connected {
        // The owner cannot reach the directory.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => UnixStream::connect(socket),
        other => other,
    }
}

fn ask<T: DeserializeOwned>(socket: &Path, request: &Value, patience: Duration) -> anyhow::Result<T> {
    let talking = || format!("asking the device at {}", socket.display());
    let stream = match connect(socket) {
        Err(source) if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Err(Gone { socket: socket.to_owned(), source }.into());
        }
        other => other.with_context(talking)?,
    };
    stream.set_read_timeout(Some(patience)).with_context(talking)?;
    let mut line = String::new();
    let asked = (&stream).write_all(format!("{request}\n").as_bytes());
    match asked
        .and_then(|()| BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut line))
        .map_err(|error| (error.kind(), error))
    {
        Err((ErrorKind::WouldBlock, _)) => {
            bail!("the device at {} does not answer within {patience:?}", socket.display())
        }
        Ok(0) | Err((ErrorKind::BrokenPipe | ErrorKind::ConnectionReset, _)) => {
            bail!("the device at {} has hung up without an answer; it may be ending, try again", socket.display())
        }
        Ok(_) => {}
        Err((_, error)) => return Err(error).with_context(talking),
    }
    let answer: Value = serde_json::from_str(&line).with_context(talking)?;
    if let Some(error) = answer.get("error").and_then(Value::as_str) {
        bail!("the device at {}: {error}", socket.display());
    }
    serde_json::from_value(answer).with_context(talking)
}
