//! An initramfs: a cpio archive in the format that Linux unpacks (`Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context, Result, ensure};

/// File types of `st_mode` (inode(7)).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive in memory. All files belong to root and have no times.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    count: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// Adds a program, or another file with these permissions, and the directories above it.
    ///
    /// # Errors
    ///
    /// The path is not absolute, or the file is 4 GiB or larger.
    pub(super) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> Result<()> {
        self.node(path, REGULAR | permissions, (0, 0), content)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    ///
    /// The path is not absolute.
    pub(super) fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.node(path, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds an empty directory.
    ///
    /// # Errors
    ///
    /// The path is not absolute.
    pub(super) fn directory(&mut self, path: &str) -> Result<()> {
        ensure!(path.starts_with('/'), "{path:?} is not absolute");
        if self.directories.insert(path.to_owned()) {
            self.node(path, DIRECTORY | 0o755, (0, 0), &[])?;
        }
        Ok(())
    }

    /// Adds the node of a character device.
    ///
    /// # Errors
    ///
    /// The path is not absolute.
    pub(super) fn character_device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.node(path, CHARACTER_DEVICE | 0o600, (major, minor), &[])
    }

    /// The archive with its end mark.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), 0, &[]);
        self.bytes
    }

    fn node(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        ensure!(path.starts_with('/'), "{path:?} is not absolute");
        let above = Path::new(path).parent().and_then(Path::to_str).unwrap_or("/");
        if above != "/" {
            self.directory(above)?;
        }
        let size_bytes = u32::try_from(content.len()).with_context(|| format!("{path} is too large"))?;
        self.entry(path.trim_start_matches('/'), mode, device, size_bytes, content);
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), size_bytes: u32, content: &[u8]) {
        self.count += 1;
        let name_bytes = name.len() as u32 + 1;
        // Magic, then: inode, mode, uid, gid, links, mtime, size, device of the file (two), device of the node (two),
        // length of the name with its final zero, checksum (only of another format).
        let fields = [self.count, mode, 0, 0, 1, 0, size_bytes, 0, 0, major, minor, name_bytes, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_each_directory_once_and_before_its_files() {
        let mut archive = Archive::default();
        archive.file("/a/b/one", 0o644, b"1").expect("a file");
        archive.file("/a/b/two", 0o755, b"22222").expect("a file");
        archive.symlink("/a/three", "b/one").expect("a link");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let places: Vec<_> =
            ["a\0", "a/b\0", "a/b/one\0", "a/b/two\0", "a/three\0", "TRAILER!!!\0"].map(|name| text.find(name)).into();
        assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?}");
        assert_eq!(text.matches("070701").count(), 6);
    }

    #[test]
    fn the_fields_of_an_entry_are_where_linux_reads_them() {
        let mut archive = Archive::default();
        archive.character_device("/console", 5, 1).expect("a device");
        let bytes = archive.finish();
        let field = |index: usize| std::str::from_utf8(&bytes[6 + 8 * index..14 + 8 * index]).expect("ASCII");
        assert_eq!(field(1), "00002180", "mode");
        assert_eq!((field(9), field(10)), ("00000005", "00000001"), "device");
        assert_eq!(field(11), "00000008", "length of the name");
        assert_eq!(&bytes[110..118], b"console\0");
    }

    #[test]
    fn a_relative_path_is_refused() {
        let refusal = Archive::default().file("etc/x", 0o644, b"").expect_err("relative").to_string();
        assert_eq!(refusal, "\"etc/x\" is not absolute");
    }
}
