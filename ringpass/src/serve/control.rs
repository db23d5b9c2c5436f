//! Status and statistics of a served device, for the control socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};
use clap::Args;
use ringpass_broker::control::{
    ByDevice, ByGuest, ControlServer, ControlSocket, DeviceStats, DeviceStatus, DiskStatus, ExecutedBy, LimitStatus,
    QueueStats, QueueStatus, RingsOffer, SettableMode, StatusSource,
};
use ringpass_broker::disk::LocatedDisk;
use ringpass_broker::engine::{EngineControl, OperatorMode, QueueCounters, RingKind, RingStatus, RingsStatus};
use ringpass_broker::printable::Chain;
use ringpass_broker::vhost_user::SocketAccess;
use ringpass_guest_abi::SLOT_SHIFT_MIN;
use ringpass_guest_abi::epoch::device::State;

use super::rings::{ModeArg, Offer};
use crate::runtime_dir::{self, SUFFIX};

const NAME_MAX: usize = 64;
/// The value of `--control-socket` that stands for no control socket.
const NONE: &str = "none";

/// Options for the control socket.
#[derive(Debug, Args)]
pub(super) struct ControlArgs {
    /// Name of the device for `ringpass dev`: letters, digits, `-`, `_` and `.` [default: the file name of the socket
    /// (with --fd: of the disk) without its extension].
    #[arg(long, value_name = "NAME", value_parser = device_name)]
    name: Option<String>,

    /// Control socket for `ringpass dev`, or `none` [default: NAME.control in $RUNTIME_DIRECTORY, in /run/ringpass for
    /// root, or in $XDG_RUNTIME_DIR/ringpass].
    #[arg(long, value_name = "PATH")]
    control_socket: Option<PathBuf>,
}

fn device_name(text: &str) -> Result<String, String> {
    let is_good = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
    if text.is_empty() || text.len() > NAME_MAX || text.starts_with('.') || !text.chars().all(is_good) {
        return Err(format!("must be 1 to {NAME_MAX} letters, digits, `-`, `_` and `.`, and not begin with a dot"));
    }
    Ok(text.to_owned())
}

impl ControlArgs {
    /// The device's name.
    pub(super) fn name(&self, socket: Option<&Path>, disk: &Path) -> String {
        self.name.clone().unwrap_or_else(|| {
            let stem = socket.unwrap_or(disk).file_stem().unwrap_or_default().to_string_lossy();
            let clean: String = stem.chars().filter(|&character| device_name(&character.to_string()).is_ok()).collect();
            device_name(&clean).unwrap_or_else(|_| "disk".into())
        })
    }

    /// The path that the operator gave.
    pub(super) fn asked_for(&self) -> Option<&Path> {
        self.control_socket.as_deref().filter(|path| path.as_os_str() != NONE)
    }

    /// The path of the control socket; creates the default directory. `None`: the device gets no control socket. A
    /// default path that is not possible is no error: the device runs without a control socket.
    pub(super) fn path(&self, name: &str) -> Option<PathBuf> {
        if let Some(path) = &self.control_socket {
            return Some(path.clone()).filter(|path| path.as_os_str() != NONE);
        }
        let found = (|| {
            let directory = runtime_dir::for_this_user().context("XDG_RUNTIME_DIR is not set")?;
            runtime_dir::make(&directory)?;
            let path = directory.join(format!("{name}{SUFFIX}"));
            ensure!(path.as_os_str().len() < 108, "{} is too long for a socket", path.display());
            Ok(path)
        })();
        found.inspect_err(Self::warn_of_missing_socket).ok()
    }

    /// Creates the socket at that [`path`](Self::path). The socket does not answer yet.
    ///
    /// # Errors
    ///
    /// The operator gave the path, and the socket cannot be created there.
    pub(super) fn bind(&self, path: Option<&Path>, access: SocketAccess) -> anyhow::Result<Option<ControlSocket>> {
        let Some(path) = path else { return Ok(None) };
        let bound = ControlSocket::bind_with(path, access);
        if self.control_socket.is_some() {
            return Ok(Some(bound.context("--control-socket")?));
        }
        Ok(bound.map_err(Into::into).inspect_err(Self::warn_of_missing_socket).ok())
    }

    fn warn_of_missing_socket(error: &anyhow::Error) {
        tracing::warn!(
            "no control socket, so `ringpass dev` will not see this device: {} (choose a path with --control-socket)",
            Chain(error.as_ref())
        );
    }
}

/// The sources of a device's status and statistics.
pub(super) struct Source {
    pub(super) name: String,
    pub(super) disk: Arc<LocatedDisk>,
    pub(super) logical_block_bytes: u32,
    pub(super) mode: ModeArg,
    pub(super) offer: Offer,
    pub(super) engine: EngineControl,
    pub(super) started: Started,
}

/// The time at which the device's counters started.
pub(super) struct Started {
    wall: SystemTime,
    at: Instant,
}

impl Started {
    pub(super) fn now() -> Self {
        Self { wall: SystemTime::now(), at: Instant::now() }
    }

    fn since_1970(&self) -> Duration {
        self.wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }
}

/// Starts to answer requests, if there is a control socket.
pub(super) fn serve(socket: Option<ControlSocket>, source: Source) -> anyhow::Result<Option<ControlServer>> {
    let source: Arc<dyn StatusSource> = Arc::new(source);
    Ok(socket.map(|socket| socket.serve(source)).transpose()?)
}

impl Source {
    /// The mode of `--mode`, unless the operator chose virtqueues since.
    fn mode_now(&self) -> &'static str {
        match self.engine.rings() {
            Some(RingsStatus { operator_mode: OperatorMode::Virtqueue, .. }) => ModeArg::Virtqueue.name(),
            _ => self.mode.name(),
        }
    }
}

impl StatusSource for Source {
    fn status(&self) -> DeviceStatus {
        let rings = self.engine.rings();
        let ring = |index: usize| rings.as_ref().and_then(|rings| rings.queues.get(index));
        let closed = rings.as_ref().and_then(|rings| rings.closed(RingKind::Direct));
        let (why_not, limits) = match &self.offer {
            Offer::No(why_not) => (why_not.clone(), None),
            Offer::Rings(config) => {
                let limits = config.limits(SLOT_SHIFT_MIN);
                let limits = LimitStatus {
                    sq_entries_max: limits.sq_entries_max,
                    cq_entries_max: limits.cq_entries_max,
                    segment_bytes_max: config.segment_bytes_max(),
                };
                (Vec::new(), Some(limits))
            }
        };
        DeviceStatus {
            name: self.name.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            disk: DiskStatus {
                path: self.disk.path().display().to_string(),
                size_bytes: self.disk.size_bytes(),
                logical_block_bytes: self.logical_block_bytes,
                read_only: self.disk.is_read_only(),
                direct_io: self.disk.is_direct_io(),
            },
            mode: self.mode_now().into(),
            rings: RingsOffer {
                offered: limits.is_some(),
                why_not,
                closed: closed.map(|refused| refused.why.clone()),
                limits,
                ended_for_cost: rings.iter().flat_map(|rings| &rings.queues).map(|ring| ring.ended_for_cost).sum(),
                wants: "guests without balloon, free page reporting, virtio-mem and postcopy".into(),
            },
            queues: (0..self.engine.counters().len()).map(|index| queue(index, &self.engine, ring(index))).collect(),
        }
    }

    fn set_mode(&self, mode: SettableMode, timeout: Duration) -> Result<(), String> {
        let mode = match mode {
            SettableMode::Auto => OperatorMode::Auto,
            SettableMode::Virtqueue => OperatorMode::Virtqueue,
            _ => return Err("this server does not have that mode".into()),
        };
        let changed = self.engine.set_operator_mode(mode, timeout).map_err(|error| error.to_string());
        match &changed {
            Ok(()) => tracing::info!(?mode, "the operator changed the mode"),
            Err(why) => tracing::warn!(?mode, "the mode stays as it was: {why}"),
        }
        changed
    }

    fn stats(&self) -> DeviceStats {
        let rings = self.engine.rings();
        let by_guest = |index: usize| {
            let counts = rings.as_ref()?.queues.get(index)?.counts;
            (counts.submitted > 0).then_some(ByGuest { submitted: counts.submitted, completed: counts.completed })
        };
        let queues = self.engine.counters().iter().enumerate();
        let queues = queues.map(|(index, counters)| QueueStats {
            index: index as u16,
            by_device: by_device(counters),
            by_guest: by_guest(index),
        });
        DeviceStats {
            name: self.name.clone(),
            started_ms: u64::try_from(self.started.since_1970().as_millis()).ok(),
            age_ms: u64::try_from(self.started.at.elapsed().as_millis()).ok(),
            queues: queues.collect(),
        }
    }
}

fn queue(index: usize, engine: &EngineControl, ring: Option<&RingStatus>) -> QueueStatus {
    let state = ring.and_then(|ring| ring.state);
    let (epoch, phase) = match state {
        Some(State::Waiting { .. }) => (None, Some("waiting")),
        Some(State::Opening { epoch }) => (Some(epoch), Some("opening")),
        Some(State::Open { epoch }) => (Some(epoch), Some("open")),
        Some(State::Draining { epoch }) => (Some(epoch), Some("draining")),
        Some(State::Ending { epoch }) => (Some(epoch), Some("ending")),
        Some(State::Ended { epoch }) => (Some(epoch), Some("ended")),
        Some(State::Finishing { .. }) => (None, Some("finishing")),
        Some(State::Stopping) => (None, Some("stopping")),
        Some(State::Detached) | None => (None, None),
    };
    let layout = ring.and_then(|ring| ring.layout);
    QueueStatus {
        index: index as u16,
        started: engine.is_started(index as u16),
        executed_by: match (phase, layout) {
            (None, _) => ExecutedBy::Virtqueue,
            (Some(_), Some(_)) => ExecutedBy::Ring,
            (Some(_), None) => ExecutedBy::BetweenRings,
        },
        epoch: epoch.map(|epoch| epoch.number()),
        phase: phase.map(str::to_owned),
        sq_entries: layout.map(|layout| layout.sq_entries),
        cq_entries: layout.map(|layout| layout.cq_entries),
        why_no_ring: ring.and_then(|ring| ring.refused.as_ref()).map(|refused| refused.why.clone()),
    }
}

fn by_device(counters: &QueueCounters) -> ByDevice {
    ByDevice {
        reads: counters.reads.get(),
        read_bytes: counters.read_bytes.get(),
        writes: counters.writes.get(),
        written_bytes: counters.written_bytes.get(),
        flushes: counters.flushes.get(),
        discards: counters.discards.get(),
        write_zeroes: counters.write_zeroes.get(),
        failed: counters.failed.get(),
        refused: counters.refused.get(),
        bounced: counters.bounced.get(),
        partial_writes: counters.partial_writes.get(),
        kicks: counters.kicks.get(),
        signals: counters.signals.get(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(socket: Option<&str>, disk: &str) -> String {
        ControlArgs { name: None, control_socket: None }.name(socket.map(Path::new), Path::new(disk))
    }

    #[test]
    fn the_default_name_comes_from_the_socket_or_the_disk() {
        assert_eq!(name(Some("/run/vm1.sock"), "/disks/a.img"), "vm1");
        assert_eq!(name(None, "/dev/vg0/root disk.img"), "rootdisk");
        assert_eq!(name(Some("/run/ "), "x"), "disk");
    }

    #[test]
    fn a_name_cannot_contain_a_path() {
        for bad in ["", ".", "..", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(device_name(bad).is_err(), "{bad}");
        }
        assert_eq!(device_name("vm-1_a.b").unwrap(), "vm-1_a.b");
    }
}
