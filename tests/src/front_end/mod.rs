//! A small vhost-user front-end and virtio-blk driver of our own, which a test can make do anything: any message with any
//! file descriptors, any descriptor chain, at any moment.

pub mod attach;
pub mod blk;
pub mod connection;
pub mod descriptor;
pub mod event;
pub mod load;
pub mod ram;
pub mod rig;
pub mod session;
pub mod shared;
pub mod vring;
pub mod wire;
