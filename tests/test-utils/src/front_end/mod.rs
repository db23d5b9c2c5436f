//! A vhost-user front-end that a test can make do anything: any message with any file descriptors, at any moment.

pub mod connection;
pub mod session;
pub mod shared;
pub mod wire;
