//! How much memory the processes of a user may pin.

use std::fmt;
use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use crate::processes::{self, Process, ProcessName};

/// What decides whether this process may pin memory, at the time of the call.
///
/// io_uring charges registered buffers, and from about Linux 6.14 also the memory of the rings themselves, to the
/// *user* (the real uid of the process that made the ring), over all its processes, and compares the sum with the
/// `RLIMIT_MEMLOCK` of the process that asks. A process with `CAP_IPC_LOCK` in the initial user namespace when it
/// makes the ring is neither limited nor charged.
///
/// The kernel does not reveal the user's sum, so [`Self::pinned_by`] is collected from the visible processes. It lacks
/// the memory of rings, the pins of processes in other containers, and the memory that rings of ended processes still
/// hold: the kernel can refuse (`ENOMEM`) what [`Self::check`] allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memlock {
    /// The soft `RLIMIT_MEMLOCK` in bytes, which the kernel applies. `None`: no limit.
    pub soft_bytes: Option<u64>,
    /// The hard `RLIMIT_MEMLOCK` in bytes: the soft limit can be raised up to it. `None`: no limit.
    pub hard_bytes: Option<u64>,
    /// Whether this process is not subject to the limit (`CAP_IPC_LOCK`, effective).
    pub exempt: bool,
    /// This user's processes that have pinned memory and are charged for it, this process included.
    pub pinned_by: Vec<PinnedBy>,
}

/// A process with pinned memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedBy {
    /// Its number in the broker's pid namespace.
    pub pid: u32,
    /// Its command name.
    pub comm: String,
    /// The memory that it has pinned, in bytes (`VmPin` in `/proc/PID/status`).
    pub pinned_bytes: u64,
}

/// Why memory cannot be pinned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemlockError {
    /// The limit is too low.
    #[error("{}", explain(*.needed_bytes, .memlock, *.is_root))]
    TooLow {
        /// The memory to pin, in bytes.
        needed_bytes: u64,
        /// The limits, and the memory that is pinned already.
        memlock: Memlock,
        /// Whether the real user is root (here without `CAP_IPC_LOCK`); configuration files name root explicitly.
        is_root: bool,
    },
    /// `setrlimit(2)` failed.
    #[error("cannot raise the soft RLIMIT_MEMLOCK to {soft_bytes} bytes: {error}")]
    Raise {
        /// The soft limit to set, in bytes.
        soft_bytes: u64,
        /// The error that the kernel returned.
        error: io::Error,
    },
}

impl Memlock {
    /// Reads the limits of this process and looks at the processes of its real user.
    ///
    /// # Errors
    /// When `getrlimit(2)` or `capget(2)` fails.
    pub fn current() -> io::Result<Self> {
        let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
        let own = Status {
            real_uid: rustix::process::getuid().as_raw(),
            // Of this thread: capabilities belong to threads.
            has_ipc_lock: capabilities(None)?.effective.contains(CapabilitySet::IPC_LOCK),
            pinned_bytes: 0,
        };
        let exempt = own.is_exempt(&Process::with_pid(std::process::id()));
        let pinned_by = processes::all().filter_map(|process| pinned_by(&process, own.real_uid)).collect();
        Ok(Self { soft_bytes: limit(soft), hard_bytes: limit(hard), exempt, pinned_by })
    }

    /// The memory that this process has pinned, in bytes, charged or not (`VmPin` in `/proc/PID/status`).
    ///
    /// # Errors
    /// When `/proc/PID/status` cannot be read or understood.
    pub(crate) fn pinned_by_this_process() -> io::Result<u64> {
        let status = Process::with_pid(std::process::id()).status().as_deref().and_then(Status::parse);
        let status =
            status.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no VmPin in /proc/PID/status"))?;
        Ok(status.pinned_bytes)
    }

    /// The memory that this user's processes have pinned and are charged for, in bytes.
    pub fn pinned_bytes(&self) -> u64 {
        self.pinned_by.iter().fold(0, |sum, process| sum.saturating_add(process.pinned_bytes))
    }

    /// Whether `needed_bytes` more can be pinned.
    ///
    /// # Errors
    /// [`MemlockError::TooLow`] names the limit that is needed and how to raise it.
    pub fn check(&self, needed_bytes: u64) -> Result<(), MemlockError> {
        if self.exempt || self.soft_bytes.is_none_or(|soft_bytes| self.total_bytes(needed_bytes) <= soft_bytes) {
            return Ok(());
        }
        let is_root = rustix::process::getuid().is_root();
        Err(MemlockError::TooLow { needed_bytes, memlock: self.clone(), is_root })
    }

    /// Raises the soft limit of this process, within the hard limit, as far as pinning `needed_bytes` more requires.
    /// This needs no privilege. For programs, not for libraries: it changes the whole process.
    ///
    /// # Errors
    /// [`MemlockError::TooLow`] if the hard limit does not allow it, [`MemlockError::Raise`].
    pub fn raise_soft(&mut self, needed_bytes: u64) -> Result<(), MemlockError> {
        let Err(too_low) = self.check(needed_bytes) else {
            return Ok(());
        };
        let soft_bytes = self.total_bytes(needed_bytes);
        if self.hard_bytes.is_some_and(|hard_bytes| hard_bytes < soft_bytes) {
            return Err(too_low);
        }
        setrlimit(Resource::RLIMIT_MEMLOCK, soft_bytes, self.hard_bytes.unwrap_or(RLIM_INFINITY))
            .map_err(|errno| MemlockError::Raise { soft_bytes, error: errno.into() })?;
        self.soft_bytes = Some(soft_bytes);
        Ok(())
    }

    /// The limit that pinning `needed_bytes` more requires, in bytes: whole pages, as the kernel counts.
    fn total_bytes(&self, needed_bytes: u64) -> u64 {
        let page_bytes = rustix::param::page_size() as u64;
        let needed_bytes = needed_bytes.checked_next_multiple_of(page_bytes).unwrap_or(u64::MAX);
        self.pinned_bytes().saturating_add(needed_bytes)
    }
}

/// Raises `RLIMIT_MEMLOCK` as far as this process may: to no limit at all, or else the soft limit to the hard limit.
///
/// For programs, not for libraries: it changes the whole process. A process that is root only in its own user namespace
/// (a rootless container) may do no more than an ordinary user.
///
/// # Errors
///
/// `getrlimit(2)` or `setrlimit(2)` failed for another reason than a missing privilege; nothing has changed.
pub fn raise_memlock() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    if soft == RLIM_INFINITY || setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_ok() {
        return Ok(());
    }
    if soft < hard {
        setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard)?;
    }
    Ok(())
}

fn limit(bytes: u64) -> Option<u64> {
    (bytes != RLIM_INFINITY).then_some(bytes)
}

fn pinned_by(process: &Process, real_uid: u32) -> Option<PinnedBy> {
    let status = Status::parse(&process.status()?)?;
    if status.real_uid != real_uid || status.pinned_bytes == 0 || status.is_exempt(process) {
        return None;
    }
    let ProcessName { pid, comm, .. } = process.name();
    Some(PinnedBy { pid, comm, pinned_bytes: status.pinned_bytes })
}

/// The fields of `/proc/PID/status` (`proc_pid_status(5)`) that matter here.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    real_uid: u32,
    has_ipc_lock: bool,
    pinned_bytes: u64,
}

impl Status {
    fn parse(text: &str) -> Option<Self> {
        /// Its number in `<linux/capability.h>`.
        const CAP_IPC_LOCK: u32 = 14;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.split_ascii_whitespace().next())
        };
        let capabilities = u64::from_str_radix(field("CapEff")?, 16).ok()?;
        // Kernel threads have no VmPin line. The unit is KiB.
        let pinned_kib = field("VmPin").and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        Some(Self {
            real_uid: field("Uid")?.parse().ok()?,
            has_ipc_lock: capabilities & 1 << CAP_IPC_LOCK != 0,
            pinned_bytes: pinned_kib.saturating_mul(1024),
        })
    }

    /// The kernel checks the capability in the initial user namespace; one in a container's own namespace does not
    /// count.
    fn is_exempt(&self, process: &Process) -> bool {
        /// `PROC_USER_INIT_INO` of `<linux/nsfs.h>`: a constant of the kernel since 3.8.
        const INITIAL: &str = "user:[4026531837]";
        self.has_ipc_lock && process.user_namespace().is_none_or(|namespace| namespace == INITIAL)
    }
}

fn explain(needed_bytes: u64, memlock: &Memlock, is_root: bool) -> String {
    let total_bytes = memlock.total_bytes(needed_bytes);
    let (total_kib, total_mib) = (total_bytes.div_ceil(1 << 10), total_bytes.div_ceil(1 << 20));
    let mut text = format!("pinning needs {}, RLIMIT_MEMLOCK is ", Bytes(needed_bytes));
    text += &memlock.soft_bytes.map_or("unlimited".into(), |soft_bytes| Bytes(soft_bytes).to_string());
    if !memlock.pinned_by.is_empty() {
        let list = processes::list(&memlock.pinned_by);
        text += &format!(" and processes of this user have already pinned {} ({list})", Bytes(memlock.pinned_bytes()));
    }
    let user = if is_root { "root" } else { "*" };
    let settings = format!(
        "LimitMEMLOCK={total_mib}M in a systemd unit, or `{user} - memlock {total_kib}` in /etc/security/limits.conf \
         and a new login"
    );
    match memlock.hard_bytes {
        Some(hard_bytes) if hard_bytes < total_bytes => {
            text += &format!(
                ". The hard limit is {}, so only root can raise it: {settings}, or for a running shell `prlimit \
                 --pid PID --memlock={total_bytes}`",
                Bytes(hard_bytes)
            );
        }
        _ => text += &format!(": raise it with `ulimit -S -l {total_kib}`, {settings}"),
    }
    text
}

impl fmt::Display for PinnedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}] {}", self.comm, self.pid, Bytes(self.pinned_bytes))
    }
}

/// Bytes for a person: exact if that is short, otherwise with one decimal.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// More digits than this are hard to read.
        const WHOLE_MAX: u64 = 9999;
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "bytes")];
        let whole = |shift: u32| (self.0.trailing_zeros() >= shift).then_some(self.0 >> shift);
        // 65536 << 10 is 64 MiB and not 65536 KiB, but 8196 KiB is not 8.0 MiB.
        let exact = units.iter().find_map(|&(shift, unit)| Some((whole(shift).filter(|&n| n > 0)?, unit)));
        match exact {
            Some((number, unit)) if number <= WHOLE_MAX => write!(f, "{number} {unit}"),
            _ => match units.iter().find(|&&(shift, _)| self.0 >> shift > 0) {
                Some(&(shift, unit)) => write!(f, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64),
                None => write!(f, "0 bytes"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn memlock(soft_bytes: u64, hard_bytes: u64, pinned: &[(u32, u64)]) -> Memlock {
        let pinned_by =
            pinned.iter().map(|&(pid, pinned_bytes)| PinnedBy { pid, comm: "ringpass".into(), pinned_bytes });
        Memlock {
            soft_bytes: Some(soft_bytes),
            hard_bytes: Some(hard_bytes),
            exempt: false,
            pinned_by: pinned_by.collect(),
        }
    }

    #[test]
    fn memory_that_is_pinned_already_counts_to_the_page() {
        let limits = memlock(8 * MIB, 8 * MIB, &[(7, 3 * MIB), (8, MIB)]);
        assert_eq!(limits.pinned_bytes(), 4 * MIB);
        limits.check(4 * MIB).unwrap();
        limits.check(4 * MIB - 1).unwrap();
        limits.check(4 * MIB + 1).unwrap_err();
        limits.check(u64::MAX).unwrap_err();
    }

    #[test]
    fn a_missing_limit_and_the_capability_both_allow_anything() {
        Memlock { soft_bytes: None, ..memlock(0, 0, &[]) }.check(u64::MAX).unwrap();
        Memlock { exempt: true, ..memlock(0, 0, &[]) }.check(u64::MAX).unwrap();
    }

    #[test]
    fn a_low_soft_limit_is_explained_with_the_commands_that_raise_it() {
        let limits = Memlock { hard_bytes: None, ..memlock(8 * MIB, 0, &[(1234, 4 * MIB)]) };
        let error = MemlockError::TooLow { needed_bytes: 64 * MIB, memlock: limits, is_root: false };
        assert_eq!(
            error.to_string(),
            "pinning needs 64 MiB, RLIMIT_MEMLOCK is 8 MiB and processes of this user have already pinned 4 MiB \
             (ringpass[1234] 4 MiB): raise it with `ulimit -S -l 69632`, LimitMEMLOCK=68M in a systemd unit, or \
             `* - memlock 69632` in /etc/security/limits.conf and a new login"
        );
    }

    #[test]
    fn a_low_hard_limit_is_explained_with_the_remedies_of_root() {
        let error = MemlockError::TooLow { needed_bytes: 10 * MIB, memlock: memlock(0, 8 * MIB, &[]), is_root: true };
        assert_eq!(
            error.to_string(),
            "pinning needs 10 MiB, RLIMIT_MEMLOCK is 0 bytes. The hard limit is 8 MiB, so only root can raise it: \
             LimitMEMLOCK=10M in a systemd unit, or `root - memlock 10240` in /etc/security/limits.conf and a new \
             login, or for a running shell `prlimit --pid PID --memlock=10485760`"
        );
    }

    #[test]
    fn the_soft_limit_is_not_raised_above_the_hard_one() {
        let mut limits = memlock(0, 8 * MIB, &[]);
        let error = limits.raise_soft(9 * MIB).unwrap_err();
        assert!(matches!(error, MemlockError::TooLow { needed_bytes, .. } if needed_bytes == 9 * MIB), "{error}");
        assert_eq!(limits.soft_bytes, Some(0));
    }

    #[test]
    fn status_is_read_by_field_name() {
        let text = "Name:\tUid: 5\nUid:\t1000\t0\t0\t0\nVmPin:\t    4096 kB\nCapPrm:\t0\nCapEff:\t0000000000004000\n";
        let expected = Status { real_uid: 1000, has_ipc_lock: true, pinned_bytes: 4 * MIB };
        assert_eq!(Status::parse(text), Some(expected));
        let kernel_thread = "Uid:\t0\t0\t0\t0\nCapEff:\t000001ffffffbfff\n";
        let expected = Status { real_uid: 0, has_ipc_lock: false, pinned_bytes: 0 };
        assert_eq!(Status::parse(kernel_thread), Some(expected));
        assert_eq!(Status::parse("Uid:\t0\n"), None);
    }

    #[test]
    fn the_limits_of_this_process_are_read() {
        let limits = Memlock::current().unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        assert_eq!(
            (limits.soft_bytes.unwrap_or(RLIM_INFINITY), limits.hard_bytes.unwrap_or(RLIM_INFINITY)),
            (soft, hard)
        );
    }

    #[test]
    fn bytes_are_shown_exactly_when_short() {
        let text = |bytes| Bytes(bytes).to_string();
        assert_eq!(text(0), "0 bytes");
        assert_eq!(text(1000), "1000 bytes");
        assert_eq!(text(64 * MIB), "64 MiB");
        assert_eq!(text(8196 << 10), "8196 KiB");
        assert_eq!(text((2 << 30) + 4096), "2.0 GiB");
        assert_eq!(text((64 << 20) + (512 << 10)), "64.5 MiB");
        assert_eq!(text(u64::MAX), "17179869184.0 GiB");
    }
}
