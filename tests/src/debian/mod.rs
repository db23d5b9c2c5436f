//! Debian packages for the tests. Nothing is installed: packages are unpacked, and kept in a cache.

pub(crate) mod apt;
pub(crate) mod cache;
mod installation;

pub use installation::Installation;
