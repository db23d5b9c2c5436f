//! What `/proc` tells about the processes of this machine, for messages that name a process.
//!
//! All of this is best effort: a process can end during the look, and a process of another user hides most of
//! its files. Such a process is skipped.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Statx, StatxFlags, statx};

use crate::printable::printable;

/// `/proc` is not mounted.
///
/// Without `/proc` a broker could open a disk only by its path, which may lead elsewhere by then, and could not find
/// the disk's holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}", self.why(), self.change())]
pub struct NoProc(());

impl NoProc {
    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        Self(())
    }

    /// Why ringpass needs it.
    pub(crate) fn why(self) -> &'static str {
        "/proc is not mounted, and without it ringpass can neither open a disk nor see which processes use the disk"
    }

    /// The remedy.
    pub(crate) fn change(self) -> &'static str {
        "mount it (`mount -t proc proc /proc`; bwrap: --proc /proc; for a chroot `mount --bind /proc CHROOT/proc`)"
    }
}

/// Whether this process finds itself in `/proc`.
///
/// # Errors
///
/// `/proc` does not list it.
pub fn require_proc() -> Result<(), NoProc> {
    if Path::new("/proc/self/fd").is_dir() { Ok(()) } else { Err(NoProc(())) }
}

/// A process, shown to people as `comm[pid]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessName {
    /// Its number in the broker's pid namespace.
    pub pid: u32,
    /// Its command name: at most 15 bytes, which the process chooses; control characters are escapes.
    pub comm: String,
    /// The process has been killed or exits, but its end waits for something, usually I/O of its own. Its files are
    /// still open.
    pub is_ending: bool,
}

impl fmt::Display for ProcessName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.comm, self.pid)?;
        if self.is_ending { f.write_str(" (which is ending)") } else { Ok(()) }
    }
}

/// `names` for the end of a sentence: the first few, and the number of the others.
pub(crate) fn list<T: fmt::Display>(names: &[T]) -> String {
    const SHOWN: usize = 4;
    let mut text = names.iter().take(SHOWN).map(T::to_string).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

/// A process that existed when `/proc` was listed.
pub(crate) struct Process {
    pub(crate) pid: u32,
    dir: PathBuf,
}

/// All visible processes, in no order. Empty without `/proc`.
pub(crate) fn all() -> impl Iterator<Item = Process> {
    numbered_entries(Path::new("/proc")).map(|(pid, dir)| Process { pid, dir })
}

impl Process {
    pub(crate) fn with_pid(pid: u32) -> Self {
        Self { pid, dir: format!("/proc/{pid}").into() }
    }

    pub(crate) fn name(&self) -> ProcessName {
        let comm = fs::read(self.dir.join("comm")).unwrap_or_default();
        let comm = printable(String::from_utf8_lossy(&comm).trim_end_matches('\n')).to_string();
        let comm = if comm.is_empty() { "?".into() } else { comm };
        ProcessName { pid: self.pid, comm, is_ending: self.is_ending() }
    }

    /// Whether the process is exiting (`exit(2)`), or has a pending SIGKILL.
    fn is_ending(&self) -> bool {
        let is_exiting = fs::read_to_string(self.dir.join("stat")).is_ok_and(|stat| is_exiting(&stat));
        is_exiting || self.status().is_some_and(|status| has_pending_kill(&status))
    }

    /// The text of `/proc/PID/status`.
    pub(crate) fn status(&self) -> Option<String> {
        fs::read_to_string(self.dir.join("status")).ok()
    }

    /// The target of `/proc/PID/ns/user`: the identity of the user namespace.
    pub(crate) fn user_namespace(&self) -> Option<String> {
        fs::read_link(self.dir.join("ns/user")).ok()?.into_os_string().into_string().ok()
    }

    /// The numbers of its open file descriptors.
    pub(crate) fn open_files(&self) -> impl Iterator<Item = u32> + use<> {
        numbered_entries(&self.dir.join("fdinfo")).map(|(number, _)| number)
    }

    /// The text of `/proc/PID/fdinfo/FD`.
    pub(crate) fn file_info(&self, fd: u32) -> Option<String> {
        fs::read_to_string(self.dir.join(format!("fdinfo/{fd}"))).ok()
    }

    /// The status of the file behind the descriptor.
    pub(crate) fn file_stat(&self, fd: u32) -> Option<Statx> {
        // Without the flag, a file of a dead network server would block the caller.
        let flags = AtFlags::STATX_DONT_SYNC;
        statx(CWD, self.dir.join(format!("fd/{fd}")), flags, StatxFlags::TYPE | StatxFlags::INO).ok()
    }
}

/// Whether the kernel's flags of a process have `PF_EXITING` (`proc_pid_stat(5)`, field 9; `<linux/sched.h>`).
fn is_exiting(stat: &str) -> bool {
    const PF_EXITING: u32 = 0x4;
    // The second field is the name in parentheses, which can contain any character.
    let flags =
        stat.rsplit_once(')').and_then(|(_, fields)| fields.split_ascii_whitespace().nth(6)?.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & PF_EXITING != 0)
}

/// Whether SIGKILL is pending, for the thread or the process (`proc_pid_status(5)`).
fn has_pending_kill(status: &str) -> bool {
    const SIGKILL_BIT: u64 = 1 << (9 - 1);
    status
        .lines()
        .filter_map(|line| line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:")))
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask & SIGKILL_BIT != 0)
}

fn numbered_entries(dir: &Path) -> impl Iterator<Item = (u32, PathBuf)> + use<> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_listed_with_its_files() {
        let own = all().find(|process| process.pid == std::process::id()).unwrap();
        let file = fs::File::open("/proc/version").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file) as u32;
        assert!(own.open_files().any(|open| open == fd));
        assert!(own.file_info(fd).unwrap().contains("flags:"));
        assert!(own.status().unwrap().contains("VmPin"));
        assert_eq!(own.name().pid, std::process::id());
        assert_ne!(own.name().comm, "?");
    }

    #[test]
    fn an_ending_process_is_recognised_by_its_flags_or_its_signals() {
        let stat = |flags| format!("7 (a) (b) D 1 7 7 0 -1 {flags} 118 0 0 0");
        assert!(is_exiting(&stat(0x40_4004)));
        assert!(!is_exiting(&stat(0x40_0100)));
        assert!(!is_exiting("7 (a"));
        let status =
            |thread, process| format!("Name:\ta\nSigPnd:\t{thread:016x}\nShdPnd:\t{process:016x}\nSigBlk:\t100\n");
        assert!(has_pending_kill(&status(0x100, 0)));
        assert!(has_pending_kill(&status(0, 0x300)));
        assert!(!has_pending_kill(&status(0x200, 0x4000)));
        assert!(!Process::with_pid(std::process::id()).is_ending());
    }

    #[test]
    fn a_long_list_is_cut_with_the_number_of_the_others() {
        assert_eq!(list(&[1, 2]), "1, 2");
        assert_eq!(list(&[1, 2, 3, 4, 5, 6]), "1, 2, 3, 4 and 2 more");
    }
}
