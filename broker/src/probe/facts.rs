//! The observations of this machine.

use std::{fs, io, path::Path};

use ringpass_restrictions::KernelSupport;
use rustix::thread::{CapabilitySet, capabilities};

use super::{Feature, Outcome, Server, trial};
#[cfg(feature = "kvm")]
use crate::kvm::{KvmRefusal, KvmSupport};
use crate::{
    engine::EngineError,
    kernel::{KernelRelease, ReleaseError},
    limits::{Memlock, OpenFiles},
    privileges::{PrivilegesError, without_privileges},
    processes::{NoProc, require_proc},
    ring::try_end_token,
};

/// The observations of the kernel, its settings and this process's limits.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Facts {
    /// The server for which the machine was observed.
    pub server: Server,
    /// Whether `/proc` is mounted.
    pub proc: Result<(), NoProc>,
    /// The kernel's release.
    pub kernel: KernelRelease,
    /// The settings that forbid io_uring.
    pub sysctl: Sysctl,
    /// Whether this process has `CAP_SYS_ADMIN` in the initial user namespace.
    pub has_sys_admin: bool,
    /// The mode on the `Seccomp` line of `/proc/self/status`: 0 none, 1 strict, 2 a filter. `None`: there is no such
    /// line.
    pub seccomp_mode: Option<u32>,
    /// Whether the simplest ring can be made. If not, nothing else was tried.
    pub setup: Outcome,
    /// Whether the server's workers can have their rings. If not, nothing further was tried.
    pub engine: Outcome,
    /// Whether the end of a ring can be detected, which requires that a certain directory can be made; or why not.
    pub end_token: Result<(), String>,
    /// The operations and restrictions that the kernel supports, or the outcome of asking.
    pub support: Result<KernelSupport, Outcome>,
    /// Each feature, and whether it works. A feature that is missing here was not tried.
    pub features: Vec<(Feature, Outcome)>,
    /// How much memory may be pinned.
    pub memlock: Memlock,
    /// The files that this process has open, and may have open. `None`: `/proc` does not tell.
    pub open_files: Option<OpenFiles>,
    /// The pools of huge pages, the smallest pages first. `None`: `/sys` does not tell.
    pub huge_pages: Option<Vec<HugePagePool>>,
    /// The abilities of KVM, or why it cannot be used.
    #[cfg(feature = "kvm")]
    pub kvm: Result<KvmSupport, KvmRefusal>,
}

/// The settings `kernel.io_uring_disabled` and `kernel.io_uring_group` (Linux 6.6).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sysctl {
    /// 0: all users may make rings; 1: the group and `CAP_SYS_ADMIN`; 2: no user. `None`: there is no such setting.
    pub io_uring_disabled: Option<u32>,
    /// The group that may make rings with 1; -1 is no group. `None`: the kernel has no such setting.
    pub io_uring_group: Option<i64>,
    /// Whether this process is in that group.
    pub in_group: bool,
}

/// The reserved huge pages of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePagePool {
    /// The size of a page in bytes.
    pub page_bytes: u64,
    /// The number of pages.
    pub total: u64,
    /// The number of pages that are neither used nor reserved.
    pub free: u64,
}

/// The machine could not be observed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FactsError {
    /// The kernel's release cannot be read.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// The limits on pinned memory cannot be read.
    #[error("cannot read the limits on pinned memory: {0}")]
    Memlock(#[source] io::Error),
    /// The abilities of a server without privileges cannot be tried.
    #[error(transparent)]
    Privileges(#[from] PrivilegesError),
    /// The thread that makes the throw-away rings could not be started.
    #[error("cannot start the thread that tries io_uring: {0}")]
    Thread(#[source] io::Error),
}

impl Facts {
    /// Observes this machine as that server will find it.
    ///
    /// # Errors
    ///
    /// [`FactsError`] if the kernel's version or this process's limits cannot be read.
    pub fn observe(server: &Server) -> Result<Self, FactsError> {
        // Before there are further threads and rings, whose files would count too.
        let open_files = OpenFiles::current().ok();
        let mut facts =
            if server.is_confined { without_privileges(|| Self::here(server))? } else { Self::here(server) }?;
        facts.open_files = open_files;
        Ok(facts)
    }

    /// Observes with the privileges of this thread.
    fn here(server: &Server) -> Result<Self, FactsError> {
        let server = *server;
        let kernel = KernelRelease::running()?;
        let sysctl = Sysctl::observe();
        // Before the trials, because the kernel needs a moment to release their pins.
        let memlock = Memlock::current().map_err(FactsError::Memlock)?;
        let has_sys_admin = has_sys_admin();
        // In this case an unprivileged thread could not make any ring, even on a capable kernel.
        let needs_capability = sysctl.io_uring_disabled == Some(1) && !sysctl.in_group;
        let tried = trial::in_own_thread(move || {
            let nothing = |setup, engine| (setup, engine, Err(Outcome::NotTried), Vec::new());
            let setup = trial::simplest_ring();
            if setup != Outcome::Works {
                return nothing(setup, Outcome::NotTried);
            }
            let engine = engine(&server);
            if engine != Outcome::Works || !server.may_offer_rings {
                return nothing(setup, engine);
            }
            let support = trial::support();
            let features = trial::all(support.as_ref().ok(), !needs_capability);
            (setup, engine, support, features)
        });
        let (setup, engine, support, features) = tried.map_err(FactsError::Thread)?;
        Ok(Self {
            server,
            proc: require_proc(),
            kernel,
            sysctl,
            has_sys_admin,
            seccomp_mode: seccomp_mode(&fs::read_to_string("/proc/self/status").unwrap_or_default()),
            setup,
            engine,
            end_token: try_end_token().map_err(|error| error.to_string()),
            support,
            features,
            memlock,
            open_files: None,
            huge_pages: HugePagePool::observe(Path::new("/sys/kernel/mm/hugepages")),
            #[cfg(feature = "kvm")]
            kvm: KvmSupport::observe(),
        })
    }

    /// The outcome of trying `feature`.
    pub fn outcome(&self, feature: Feature) -> &Outcome {
        self.features.iter().find(|(tried, _)| *tried == feature).map_or(&Outcome::NotTried, |(_, outcome)| outcome)
    }
}

/// Tries the rings of the server's workers.
fn engine(server: &Server) -> Outcome {
    match server.engine.try_rings() {
        Ok(()) => Outcome::Works,
        Err(EngineError::Ring { call, source }) => Outcome::Failed { step: call, errno: source.raw_os_error() },
        Err(EngineError::Eventfd(error)) => Outcome::Failed { step: "eventfd", errno: error.raw_os_error() },
        Err(_) => Outcome::Failed { step: "making the workers' rings", errno: None },
    }
}

impl Sysctl {
    fn observe() -> Self {
        let io_uring_group = number("/proc/sys/kernel/io_uring_group".as_ref());
        let in_group = io_uring_group.is_some_and(|group: i64| {
            let groups = rustix::process::getgroups().unwrap_or_default();
            (groups.iter().chain([&rustix::process::getegid()])).any(|gid| i64::from(gid.as_raw()) == group)
        });
        Self { io_uring_disabled: number("/proc/sys/kernel/io_uring_disabled".as_ref()), io_uring_group, in_group }
    }
}

impl HugePagePool {
    /// `None`: there is no such directory.
    fn observe(directory: &Path) -> Option<Vec<Self>> {
        let mut pools: Vec<Self> = fs::read_dir(directory)
            .ok()?
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let kilobytes: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
                let free: u64 = number(&entry.path().join("free_hugepages"))?;
                let reserved: u64 = number(&entry.path().join("resv_hugepages"))?;
                Some(Self {
                    page_bytes: kilobytes << 10,
                    total: number(&entry.path().join("nr_hugepages"))?,
                    free: free.saturating_sub(reserved),
                })
            })
            .collect();
        pools.sort_by_key(|pool| pool.page_bytes);
        Some(pools)
    }
}

fn number<T: std::str::FromStr>(path: &Path) -> Option<T> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn has_sys_admin() -> bool {
    /// `PROC_USER_INIT_INO` of `<linux/nsfs.h>`: a capability in any other user namespace does not count.
    const INITIAL_USER_NAMESPACE: &str = "user:[4026531837]";
    let initial = fs::read_link("/proc/self/ns/user").is_ok_and(|name| name.as_os_str() == INITIAL_USER_NAMESPACE);
    initial && capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

fn seccomp_mode(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Seccomp:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seccomp_mode_is_read_from_its_own_line() {
        assert_eq!(seccomp_mode("NoNewPrivs:\t0\nSeccomp:\t2\nSeccomp_filters:\t1\n"), Some(2));
        assert_eq!(seccomp_mode("Seccomp_filters:\t1\n"), None);
    }

    #[test]
    fn pools_of_huge_pages_are_listed_by_size_without_reserved_pages() {
        let directory = tempfile::tempdir().unwrap();
        for (name, total, free, reserved) in [("hugepages-1048576kB", 2, 1, 0), ("hugepages-2048kB", 512, 100, 30)] {
            let pool = directory.path().join(name);
            fs::create_dir(&pool).unwrap();
            fs::write(pool.join("nr_hugepages"), format!("{total}\n")).unwrap();
            fs::write(pool.join("free_hugepages"), format!("{free}\n")).unwrap();
            fs::write(pool.join("resv_hugepages"), format!("{reserved}\n")).unwrap();
        }
        fs::create_dir(directory.path().join("other")).unwrap();
        assert_eq!(
            HugePagePool::observe(directory.path()),
            Some(vec![
                HugePagePool { page_bytes: 2 << 20, total: 512, free: 70 },
                HugePagePool { page_bytes: 1 << 30, total: 2, free: 1 },
            ])
        );
        assert_eq!(HugePagePool::observe(&directory.path().join("missing")), None);
    }

    #[test]
    fn a_feature_that_is_not_listed_was_not_tried() {
        let facts = Facts { features: vec![], ..Facts::observe(&Server::for_tests()).unwrap() };
        assert_eq!(*facts.outcome(Feature::NoSqArray), Outcome::NotTried);
    }
}
