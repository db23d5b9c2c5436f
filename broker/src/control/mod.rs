//! Inspecting a device from outside: each process that serves a device answers requests on a Unix socket.
//!
//! A client sends one line, a JSON object such as `{"request":"show"}`, and gets one line, a JSON object: a
//! [`DeviceStatus`], a [`DeviceStats`], or `{"error": "..."}`. Later versions only add fields. Every process that may
//! connect to the socket may ask: processes of the socket's owner, and others only if the server's options
//! `--control-socket-group` and `--control-socket-mode` admit them. A request that changes something, `set-mode`, is open to processes of root and
//! of the user that serves the device only.

mod clients;
mod mode_change;
mod server;
mod status;

use std::time::Duration;

pub use crate::vhost_user::listener::remove_if_stale;
pub use mode_change::{ModeReport, SettableMode};
pub use server::{ControlError, ControlServer, ControlSocket};
pub use status::{
    ByDevice, ByGuest, DeviceStats, DeviceStatus, DiskStatus, ExecutedBy, LimitStatus, QueueStats, QueueStatus,
    RingsOffer,
};

/// The source of the answers. Called on the thread of the socket, except [`set_mode`](Self::set_mode).
pub trait StatusSource: Send + Sync {
    /// What the device is, and how its queues are executed now.
    fn status(&self) -> DeviceStatus;

    /// What the device has done.
    fn stats(&self) -> DeviceStats;

    /// Changes the operator's mode and waits until it is in force, at most for `timeout`. Called on a thread of its own, one call at a
    /// time.
    ///
    /// # Errors
    ///
    /// Why the mode stays what it was, for the operator.
    fn set_mode(&self, mode: SettableMode, timeout: Duration) -> Result<(), String>;
}
