//! Whether io_uring may be used at all, and which of its features are available.

use std::io;

use nix::libc::{EACCES, EINVAL, EMFILE, ENFILE, ENOMEM, ENOSYS, EPERM};
use ringpass_restrictions::{Access, Policy};

use super::{
    Check, Facts, Feature, ModeName, Outcome, Status,
    feature::{Need, Traits},
    limits::{self, bytes},
};

/// The value on the line `Seccomp` of `/proc/self/status` if a filter is installed.
const SECCOMP_MODE_FILTER: u32 = 2;

/// All checks of io_uring itself.
pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![io_uring(facts), proc(facts), workers(facts), operations(facts), end_of_rings(facts)];
    checks.extend(Feature::ALL.map(|feature| self::feature(facts, feature)));
    checks
}

fn io_uring(facts: &Facts) -> Check {
    let check = Check::ok("io-uring", "io_uring", settings(facts)).needed_for(&ModeName::KERNEL_EXECUTED);
    match facts.setup {
        Outcome::Works => check,
        Outcome::Failed { errno, .. } => {
            let (why, change) = refusal(facts, "io_uring_setup", errno);
            check.missing(why, change)
        }
        Outcome::NotTried => check.with_status(Status::NotTried),
    }
}

fn proc(facts: &Facts) -> Check {
    let check = Check::ok("proc", "/proc", "mounted").needed_for(&ModeName::KERNEL_EXECUTED);
    match facts.proc {
        Ok(()) => check,
        Err(error) => check.missing(error.why(), vec![error.change().to_owned()]),
    }
}

/// The rings of a server's own threads, which serve virtqueues; each device has at least one.
fn workers(facts: &Facts) -> Check {
    let engine = &facts.server.engine;
    let detail = format!("{} for {} queues, {}", engine.workers(), engine.queues, bytes(engine.ring_bytes()));
    let check =
        Check::ok("worker-rings", "rings of the server's workers", detail).needed_for(&ModeName::KERNEL_EXECUTED);
    match facts.engine {
        Outcome::Works => check,
        Outcome::Failed { step, errno } => {
            let (why, change) = refusal(facts, step, errno);
            check.missing(why, change)
        }
        Outcome::NotTried => check.with_status(Status::NotTried),
    }
}

fn end_of_rings(facts: &Facts) -> Check {
    let detail = "a directory in $XDG_RUNTIME_DIR, /dev/shm or $TMPDIR";
    let check = Check::ok("end-of-rings", "detecting that a ring has ended", detail).needed_for(&ModeName::DIRECT);
    match &facts.end_token {
        Ok(()) => check,
        Err(error) => check.missing(
            error.clone(),
            vec!["mount a tmpfs at /dev/shm, or name a writable directory with TMPDIR=DIRECTORY".to_owned()],
        ),
    }
}

fn settings(facts: &Facts) -> String {
    let sysctl = &facts.sysctl;
    let disabled = match sysctl.io_uring_disabled {
        Some(0) => "kernel.io_uring_disabled is 0 (allowed for all users)".to_owned(),
        Some(1) => format!(
            "kernel.io_uring_disabled is 1 (group {} and CAP_SYS_ADMIN only; this process {})",
            sysctl.io_uring_group.unwrap_or(-1),
            if sysctl.in_group || facts.has_sys_admin { "qualifies" } else { "does not qualify" }
        ),
        Some(2) => "kernel.io_uring_disabled is 2 (forbidden for all users)".to_owned(),
        Some(other) => format!("kernel.io_uring_disabled is {other}"),
        None => "this kernel has no setting kernel.io_uring_disabled".to_owned(),
    };
    let seccomp =
        if facts.seccomp_mode == Some(SECCOMP_MODE_FILTER) { "a seccomp filter" } else { "no seccomp filter" };
    format!("{disabled}; {seccomp}")
}

/// Why something is refused, and what to change.
type Refusal = (String, Vec<String>);

fn refused(why: impl Into<String>, change: &[&str]) -> Refusal {
    (why.into(), change.iter().map(|&line| line.to_owned()).collect())
}

/// Why a system call of io_uring fails even in its simplest use.
fn refusal(facts: &Facts, call: &str, errno: Option<i32>) -> Refusal {
    let sysctl = &facts.sysctl;
    let filtered = facts.seccomp_mode == Some(SECCOMP_MODE_FILTER);
    match (errno.unwrap_or(EINVAL), sysctl.io_uring_disabled) {
        (EPERM, Some(2)) => refused(
            "kernel.io_uring_disabled is 2: no process may make rings, root included",
            &[
                "allow all users: sysctl kernel.io_uring_disabled=0",
                "allow one group: sysctl kernel.io_uring_disabled=1 kernel.io_uring_group=GID, and run the broker in \
                 that group",
                "and write it to a file in /etc/sysctl.d/ to keep it",
            ],
        ),
        (EPERM, Some(1)) if !sysctl.in_group && !facts.has_sys_admin => group_refusal(sysctl.io_uring_group),
        (EPERM, _) if filtered => refused(
            format!("a seccomp filter refuses {call} (EPERM), although the kernel's settings allow it"),
            ALLOW_IN_CONTAINERS,
        ),
        (ENOSYS, _) if filtered && (sysctl.io_uring_disabled.is_some() || facts.setup == Outcome::Works) => {
            refused(format!("a seccomp filter hides {call} (ENOSYS), although the kernel has it"), ALLOW_IN_CONTAINERS)
        }
        (ENOSYS, None) if filtered => refused(
            "io_uring_setup does not exist (ENOSYS): the seccomp filter hides it, or the kernel has no io_uring",
            &[ALLOW_IN_CONTAINERS, &["if the kernel itself has no io_uring: use one with CONFIG_IO_URING=y"]].concat(),
        ),
        (ENOSYS, _) => refused(
            "this kernel has no io_uring (ENOSYS); a sandbox that emulates Linux may also lack it",
            &["use a kernel with CONFIG_IO_URING=y"],
        ),
        (errno @ (EPERM | EACCES), _) => refused(
            format!(
                "{call} is refused ({}) although no setting forbids io_uring: a security module refuses it",
                name(errno)
            ),
            &["allow io_uring to the broker in the policy of SELinux (class io_uring), AppArmor or the module in use"],
        ),
        (ENOMEM, _) => no_memory(facts),
        (errno @ (EMFILE | ENFILE), _) => refused(
            format!("too many files are open ({})", name(errno)),
            &["raise RLIMIT_NOFILE (ulimit -n) or fs.file-max"],
        ),
        (errno, _) => refused(format!("{call} fails: {}", name(errno)), &[&format!("see {call}(2) for this error")]),
    }
}

/// Linux 6.14 and later charge the memory of rings to the user, against RLIMIT_MEMLOCK.
fn no_memory(facts: &Facts) -> Refusal {
    let (memlock, engine) = (&facts.memlock, &facts.server.engine);
    let needed_bytes = engine.ring_bytes();
    let group = "if that does not help: raise the limit of the memory control group (memory.max, MemoryMax=)";
    match memlock.soft_bytes.filter(|_| !memlock.exempt) {
        None => refused("there is no memory for the rings of the server's workers (ENOMEM)", &[group]),
        Some(soft_bytes) => refused(
            format!(
                "there is no memory for the rings of the server's workers (ENOMEM): they take {}, which this \
                 kernel charges to RLIMIT_MEMLOCK, and RLIMIT_MEMLOCK is {} for all such memory of this user",
                bytes(needed_bytes),
                bytes(soft_bytes)
            ),
            &[
                &format!(
                    "raise the hard RLIMIT_MEMLOCK to {0} KiB or more (root: `ulimit -H -l {0}`, LimitMEMLOCK={0}K in a systemd \
                     unit, --ulimit memlock={1} for a container), or give the broker CAP_IPC_LOCK",
                    needed_bytes.div_ceil(1 << 10),
                    needed_bytes
                ),
                "or use fewer workers: --num-queues 1, or one CPU in --cpus",
                group,
            ],
        ),
    }
}

fn group_refusal(group: Option<i64>) -> Refusal {
    const ALL_USERS: &str = "or allow all users: sysctl kernel.io_uring_disabled=0";
    match group {
        Some(gid) if gid >= 0 => refused(
            format!("kernel.io_uring_disabled is 1 and this process is not in group {gid} (kernel.io_uring_group)"),
            &[
                &format!(
                    "run the broker in group {gid}: Group={gid} or SupplementaryGroups={gid} in a systemd unit, or \
                     usermod -aG"
                ),
                ALL_USERS,
            ],
        ),
        _ => refused(
            "kernel.io_uring_disabled is 1 and kernel.io_uring_group names no group",
            &["name one: sysctl kernel.io_uring_group=GID, and run the broker in it", ALL_USERS],
        ),
    }
}

/// How to make the usual container engines allow io_uring.
const ALLOW_IN_CONTAINERS: &[&str] = &[
    "take the engine's default seccomp profile and add io_uring_setup, io_uring_enter and io_uring_register to it:",
    "Docker: docker run --security-opt seccomp=PROFILE.json",
    "Podman: podman run --security-opt seccomp=PROFILE.json (default: /usr/share/containers/seccomp.json)",
    "containerd: nerdctl run --security-opt seccomp=PROFILE.json",
    "Kubernetes: the file in /var/lib/kubelet/seccomp/ on the node, and in the pod securityContext: seccompProfile: \
     {type: Localhost, localhostProfile: PROFILE.json}",
    "elsewhere: SystemCallFilter=@aio in the systemd unit, or the sandbox's own list",
];

fn operations(facts: &Facts) -> Check {
    let policy = Policy::direct(Access::ReadWrite);
    let title = "operations of the direct policy";
    let check = |detail: String| Check::ok("operations", title, detail).needed_for(&ModeName::DIRECT);
    match &facts.support {
        Err(Outcome::Failed { errno: Some(ENOMEM), .. }) if !limits::can_pin(facts) => {
            check(policy.operations().to_string()).with_status(Status::NotTried)
        }
        Err(Outcome::Failed { step, errno }) => {
            let error = name(errno.unwrap_or(EINVAL));
            let (old, change) = match errno {
                Some(EINVAL) => (": it is older than Linux 5.10 and has no restrictions", "use Linux 6.10 or later"),
                _ => ("", "see io_uring_register(2) for this error"),
            };
            check(policy.operations().to_string()).missing(format!("{step}: {error}{old}"), vec![change.to_owned()])
        }
        Err(_) => check(policy.operations().to_string()).with_status(Status::NotTried),
        Ok(support) => match policy.compile(support) {
            Ok(compiled) => check(format!(
                "{}; the broker keeps {}; restrictions as {}",
                compiled.operations(),
                compiled.register_operations(),
                compiled.semantics()
            )),
            Err(error) => check(policy.operations().to_string())
                .missing(error.to_string(), vec!["use Linux 6.10 or later".to_owned()]),
        },
    }
}

fn feature(facts: &Facts, feature: Feature) -> Check {
    let Traits { name: feature_name, title, since, need, without } = feature.traits();
    let check = Check::ok(feature_name, title, since).needed_for(match need {
        Need::Direct => &ModeName::DIRECT,
        Need::GuestRam => &[ModeName::DirectGuestRam],
        Need::Optional => &[],
    });
    let (step, errno) = match facts.outcome(feature) {
        Outcome::Works => return check,
        Outcome::NotTried => return check.with_status(Status::NotTried),
        // The check of memory that may be pinned gives the reason.
        Outcome::Failed { errno: Some(ENOMEM), .. } if !limits::can_pin(facts) => {
            return check.with_status(Status::NotTried);
        }
        Outcome::Failed { step, errno } => (step, *errno),
    };
    let (cause, change) = match errno {
        None => (format!("{step} did not happen"), format!("use another kernel; this one has a defect ({since})")),
        Some(ENOMEM) => (
            format!("{step}: {}", name(ENOMEM)),
            "raise RLIMIT_MEMLOCK (see the line on memory that may be pinned), or the memory control group's limit"
                .to_owned(),
        ),
        Some(errno @ (EPERM | EACCES)) => (
            format!("{step}: {}", name(errno)),
            format!("give the broker the privilege, or allow it in the security module's policy ({since})"),
        ),
        Some(errno) => (format!("{step}: {}", name(errno)), format!("use a kernel that has it: {since}")),
    };
    check.missing(format!("{cause}; without it, {without}"), vec![change])
}

fn name(errno: i32) -> String {
    io::Error::from_raw_os_error(errno).to_string()
}
