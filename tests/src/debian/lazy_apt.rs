//! An apt that is made when something asks for it: most often the cache has everything.

use std::cell::OnceCell;

use anyhow::{Context, Result};

use super::apt::Apt;

/// An apt that is made once, when the cache lacks a package.
#[derive(Debug, Default)]
pub(crate) struct LazyApt {
    /// A release of Debian. `None`: the repositories of this machine.
    suite: Option<&'static str>,
    apt: OnceCell<(tempfile::TempDir, Apt)>,
}

impl LazyApt {
    /// An apt for a release of Debian, see [`Apt::of_release`].
    pub(crate) fn of_release(suite: &'static str) -> Self {
        Self { suite: Some(suite), apt: OnceCell::new() }
    }

    /// The apt.
    ///
    /// # Errors
    ///
    /// As [`Apt::new`] and [`Apt::of_release`].
    pub(crate) fn get(&self) -> Result<&Apt> {
        if let Some((_, apt)) = self.apt.get() {
            return Ok(apt);
        }
        let directory = tempfile::tempdir().context("cannot make a directory for apt")?;
        let apt = match self.suite {
            None => Apt::new(directory.path())?,
            Some(suite) => Apt::of_release(directory.path(), suite)?,
        };
        Ok(&self.apt.get_or_init(|| (directory, apt)).1)
    }
}
