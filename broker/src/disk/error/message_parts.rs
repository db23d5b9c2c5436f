//! The parts of the message of a [`DiskError`](super::DiskError): what the error depends on, and what to do.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{Access, AtFlags, CWD, accessat},
    io::Errno,
};

use crate::{
    disk::holders::DeviceUse,
    processes::{ProcessName, list},
};

/// The longest file: its offsets are signed (`loff_t`).
const FILE_BYTES_MAX: u64 = i64::MAX as u64;

pub(super) fn access(read_only: bool) -> &'static str {
    if read_only { "for reading" } else { "for reading and writing" }
}

pub(super) fn open_hint(path: &Path, read_only: bool, error: &io::Error) -> String {
    let word = shell_word(path);
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) if path.starts_with("/dev") => ". `lsblk` lists the devices that are there".into(),
        Some(Errno::NOENT) if read_only => ". Check the path".into(),
        Some(Errno::NOENT) => {
            format!(". Check the path, or create the disk, for example with `truncate -s 10G {word}`")
        }
        Some(Errno::NOTDIR) => ". Check the path: a part of it is not a directory".into(),
        Some(Errno::ACCESS | Errno::PERM) if read_only => format!(". Check who may read it: `ls -l {word}`"),
        Some(Errno::ACCESS | Errno::PERM) if !may_read(path) => {
            format!(". Check who may read and write it: `ls -l {word}`")
        }
        Some(Errno::ACCESS | Errno::PERM) => {
            format!(". Check who may write to it (`ls -l {word}`, `lsattr {word}`), or open it read-only")
        }
        Some(Errno::ROFS) => ". Open it read-only".into(),
        Some(Errno::TXTBSY) => ". It is being executed or used as swap space".into(),
        Some(Errno::NXIO | Errno::NODEV) => ". No driver serves this device number".into(),
        Some(Errno::NOMEDIUM) => ". Insert a medium".into(),
        _ => String::new(),
    }
}

/// Whether this user may read the file, as far as its mode tells.
fn may_read(path: &Path) -> bool {
    accessat(CWD, path, Access::READ_OK, AtFlags::EACCESS).is_ok()
}

pub(super) fn empty_hint(path: &Path, is_block_device: bool) -> String {
    if is_block_device {
        ": the device has no medium, or is not set up yet (`lsblk`)".into()
    } else {
        format!(": give the file a size, for example with `truncate -s 10G {}`", shell_word(path))
    }
}

pub(super) fn tail_hint(path: &Path, size_bytes: u64, logical_block_bytes: u32, is_block_device: bool) -> String {
    if is_block_device {
        return "Change the size of the device".into();
    }
    let whole_bytes = size_bytes.next_multiple_of(logical_block_bytes.into());
    if whole_bytes > FILE_BYTES_MAX {
        let less_bytes = size_bytes - size_bytes % u64::from(logical_block_bytes);
        return format!("A file cannot be longer, so cut off its end: `truncate -s {less_bytes} {}`", shell_word(path));
    }
    let mut hint = format!("Extend it with `truncate -s {whole_bytes} {}`", shell_word(path));
    if logical_block_bytes > 512 && size_bytes % 512 == 0 {
        hint.push_str(", or leave out --logical-block-size, which makes its blocks 512 bytes");
    }
    hint
}

pub(super) fn held_for(read_only: bool) -> &'static str {
    if read_only { " for writing" } else { "" }
}

pub(super) fn after(waited: Duration) -> String {
    if waited.is_zero() { String::new() } else { format!(" (still so after waiting {:.1} s)", waited.as_secs_f64()) }
}

pub(super) fn lock_holders(holders: &[ProcessName]) -> String {
    match holders {
        [] => "by I/O still in flight from a process that has ended, or by a process that this user cannot inspect: \
               run `lsof` as root to see"
            .into(),
        [holder] => format!("by {holder}. Stop that process first"),
        holders => format!("by {}. Stop these processes first", list(holders)),
    }
}

pub(super) fn devices_over(devices: &[PathBuf]) -> String {
    match devices {
        [] => String::new(),
        devices => {
            let devices = devices.iter().map(|device| device.display().to_string()).collect::<Vec<_>>();
            format!(" (in use on the same storage: {})", list(&devices))
        }
    }
}

pub(super) fn device_uses(uses: &[DeviceUse]) -> String {
    match uses {
        [] => "by I/O still in flight from a process that has ended, or by a process that this user cannot inspect: \
               run `lsof` and `lsblk` as root to see"
            .into(),
        uses => format!("{}. Free it first, or open it read-only", list(uses)),
    }
}

/// `path` as one word in a shell command.
pub(super) fn shell_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(plain) && !text.starts_with('-') {
        text.into_owned()
    } else if text.starts_with('-') {
        shell_word(&Path::new(".").join(path))
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_a_command_is_one_word() {
        assert_eq!(shell_word(Path::new("/a/b-1.img")), "/a/b-1.img");
        assert_eq!(shell_word(Path::new("my disk's.img")), r"'my disk'\''s.img'");
        assert_eq!(shell_word(Path::new("-rf")), "./-rf");
    }
}
