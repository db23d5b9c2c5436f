//! Changes of the operator's mode, which take time: each on a thread of its own, one at a time.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use serde::{Deserialize, Serialize};

use super::StatusSource;
use super::clients::Answer;
use crate::threads::leave_signals_to_others;

/// User id of root.
const ROOT: u32 = 0;
/// How long drivers may take to leave their rings, if the request does not say.
const DEFAULT_TIMEOUT_MS: u64 = 10_000;
/// The longest time that a request may give them, in milliseconds.
const TIMEOUT_MS_MAX: u64 = 3_600_000;

/// What an operator can have a device do at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SettableMode {
    /// Queues whose drivers ask for rings have them.
    Auto,
    /// All queues are virtqueues.
    Virtqueue,
}

impl SettableMode {
    /// As a request says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Virtqueue => "virtqueue",
        }
    }
}

/// The answer to a change that is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModeReport {
    /// The mode.
    pub mode: SettableMode,
    /// How long the change took, in microseconds.
    pub took_us: u64,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OperatorSetting {
    mode: SettableMode,
    timeout_ms: Option<u64>,
}

/// The changes of a device's mode.
pub(super) struct ModeChanges {
    source: Arc<dyn StatusSource>,
    /// Wakes the thread of the clients.
    wake: Arc<OwnedFd>,
    is_under_way: Arc<AtomicBool>,
}

impl ModeChanges {
    pub(super) fn new(source: Arc<dyn StatusSource>, wake: Arc<OwnedFd>) -> Self {
        Self { source, wake, is_under_way: Arc::default() }
    }

    /// Begins a change for a client.
    pub(super) fn begin(&self, setting: OperatorSetting, client: &UnixStream) -> Answer {
        let timeout_ms = setting.timeout_ms.unwrap_or(DEFAULT_TIMEOUT_MS);
        if timeout_ms > TIMEOUT_MS_MAX {
            return refusal(&format!("timeout_ms is {timeout_ms}, the most is {TIMEOUT_MS_MAX}"));
        }
        if !may_change(client) {
            return refusal("only root and the user that serves the device may change its mode");
        }
        if self.is_under_way.swap(true, Ordering::Acquire) {
            return refusal("another change of the mode is under way: try again when it has ended");
        }
        let (source, wake, is_under_way) = (self.source.clone(), self.wake.clone(), self.is_under_way.clone());
        let (answer, later) = channel();
        let change = move || {
            leave_signals_to_others();
            let start = Instant::now();
            let outcome = source.set_mode(setting.mode, Duration::from_millis(timeout_ms));
            let took_us = start.elapsed().as_micros() as u64;
            let json = match outcome {
                Ok(()) => serde_json::json!(ModeReport { mode: setting.mode, took_us }),
                Err(why) => serde_json::json!({ "error": why }),
            };
            // Before the answer: a client that has it may ask for the next change.
            is_under_way.store(false, Ordering::Release);
            // The client may be gone.
            let _ = answer.send(json.to_string());
            let _ = rustix::io::write(&*wake, &1_u64.to_ne_bytes());
        };
        match thread::Builder::new().name("mode-change".into()).spawn(change) {
            Ok(_) => Answer::Later(later),
            Err(error) => {
                self.is_under_way.store(false, Ordering::Release);
                refusal(&format!("no thread for the change of the mode: {error}"))
            }
        }
    }
}

/// Whether the process behind a connection may change something (`SO_PEERCRED`, unix(7)): the socket's mode and group may admit others,
/// who only look.
fn may_change(client: &UnixStream) -> bool {
    // Not rustix: its process ids cannot be 0, which a peer in another namespace has.
    let peer = getsockopt(client, PeerCredentials);
    peer.is_ok_and(|peer| peer.uid() == ROOT || peer.uid() == rustix::process::geteuid().as_raw())
}

fn refusal(why: &str) -> Answer {
    Answer::Now(serde_json::json!({ "error": why }).to_string())
}
