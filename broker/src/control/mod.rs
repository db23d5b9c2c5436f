//! Inspecting a device from outside: each process that serves a device answers requests on a Unix socket.
//!
//! A client sends one line, a JSON object such as `{"request":"show"}`, and gets one line, a JSON object: a
//! [`DeviceStatus`], a [`DeviceStats`], or `{"error": "..."}`. Later versions only add fields. Every process that may
//! connect to the socket may ask: processes of the socket's owner, and others only if the server's options
//! `--control-socket-group` and `--control-socket-mode` admit them. No request changes anything.

mod clients;
mod server;
mod status;

pub use crate::vhost_user::listener::remove_if_stale;
pub use server::{ControlError, ControlServer, ControlSocket};
pub use status::{
    ByDevice, ByGuest, DeviceStats, DeviceStatus, DiskStatus, ExecutedBy, LimitStatus, QueueStats, QueueStatus,
    RingsOffer,
};

/// The source of the answers. Called on the thread of the socket.
pub trait StatusSource: Send + Sync {
    /// What the device is, and how its queues are executed now.
    fn status(&self) -> DeviceStatus;

    /// What the device has done.
    fn stats(&self) -> DeviceStats;
}
