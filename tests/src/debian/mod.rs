//! Debian packages for the tests. The tests install nothing: they unpack packages, and keep them in a cache.

pub(crate) mod apt;
pub(crate) mod cache;
mod installation;
pub(crate) mod lazy_apt;

pub use installation::Installation;
