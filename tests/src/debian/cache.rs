//! The cache of guest images between test runs, in which every entry is complete.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rustix::fs::FlockOperation;

/// The directory of cached files: `$XDG_CACHE_HOME/ringpass-tests`, or the same in `~/.cache`.
///
/// An entry is a directory that appears by a rename, so it is complete. Its name has the versions of its sources, and
/// it never changes. You may remove the whole directory while no test runs.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the cache, making the directory if there is none.
    ///
    /// # Errors
    ///
    /// Neither `XDG_CACHE_HOME` nor `HOME` is set, or the directory cannot be made.
    pub(crate) fn open() -> Result<Self> {
        let absolute = |variable| env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
        let parent = absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .context("neither XDG_CACHE_HOME nor HOME is an absolute path: set one, guest images are cached there")?;
        Self::at(parent.join("ringpass-tests"))
    }

    fn at(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
        Ok(Self { root })
    }

    /// Waits until no other process makes entries, and keeps others from making entries until the file is dropped.
    /// Readers of finished entries need no lock.
    ///
    /// # Errors
    ///
    /// The lock's file cannot be opened or locked.
    pub(crate) fn lock(&self) -> Result<File> {
        let path = self.root.join("lock");
        let file = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(file)
    }

    /// The directory of the cache.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The entry `name`, if it exists.
    pub(crate) fn find(&self, name: &str) -> Option<PathBuf> {
        Some(self.root.join(name)).filter(|path| path.is_dir())
    }

    /// The entry `name`. If it does not exist, `make` fills an empty directory. The caller holds the
    /// [`lock`](Self::lock).
    ///
    /// # Errors
    ///
    /// `make` or the file system fails. Nothing is left then.
    pub(crate) fn entry(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        ensure!(!name.is_empty() && !name.contains('/'), "{name:?} is not a name for a cache entry");
        if let Some(found) = self.find(name) {
            return Ok(found);
        }
        let unfinished = tempfile::Builder::new()
            .prefix(".unfinished-")
            .tempdir_in(&self.root)
            .context("cannot make a cache entry")?;
        make(unfinished.path()).with_context(|| format!("cannot make the cache entry {name}"))?;
        let path = self.root.join(name);
        fs::rename(unfinished.keep(), &path).with_context(|| format!("cannot move to {}", path.display()))?;
        Ok(path)
    }

    /// The line that was remembered under `key`.
    pub(crate) fn recall(&self, key: &str) -> Option<String> {
        fs::read_to_string(self.root.join(key)).ok().map(|text| text.trim().to_owned())
    }

    /// Remembers one line under `key`, for example which entry is the newest kernel of a series.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub(crate) fn remember(&self, key: &str, line: &str) -> Result<()> {
        let file = tempfile::NamedTempFile::new_in(&self.root).context("cannot remember a line")?;
        fs::write(file.path(), format!("{line}\n")).context("cannot remember a line")?;
        file.persist(self.root.join(key)).context("cannot remember a line")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn the_cache_makes_an_entry_once_and_keeps_only_complete_ones() {
        let directory = tempfile::tempdir().expect("a directory");
        let cache = Cache::at(directory.path().join("cache")).expect("a new cache");
        let failed = cache.entry("linux-1", |path| {
            fs::write(path.join("vmlinuz"), "half")?;
            bail!("no space")
        });
        assert_eq!(failed.expect_err("as made").root_cause().to_string(), "no space");
        assert_eq!(cache.find("linux-1"), None);
        assert_eq!(fs::read_dir(directory.path().join("cache")).expect("the cache").count(), 0);

        let made = cache.entry("linux-1", |path| Ok(fs::write(path.join("vmlinuz"), "all")?)).expect("an entry");
        let again = cache.entry("linux-1", |_| bail!("made twice")).expect("the same entry");
        assert_eq!(made, again);
        assert_eq!(fs::read_to_string(again.join("vmlinuz")).expect("its file"), "all");
    }

    #[test]
    fn the_cache_recalls_the_last_remembered_line() {
        let directory = tempfile::tempdir().expect("a directory");
        let cache = Cache::at(directory.path().to_owned()).expect("a cache");
        assert_eq!(cache.recall("newest"), None);
        cache.remember("newest", "linux-1").expect("a write");
        cache.remember("newest", "linux-2").expect("a write");
        assert_eq!(cache.recall("newest").as_deref(), Some("linux-2"));
    }
}
