//! Whether io_uring may be used at all, and which of its features are there.

use std::io;

use nix::libc::{EACCES, EINVAL, EMFILE, ENFILE, ENOMEM, ENOSYS, EPERM};
use ringpass_restrictions::{Access, Policy};

use super::{
    Check, Facts, Feature, ModeName, Outcome, Status,
    feature::{Need, Traits},
};

/// `/proc/self/status`, line `Seccomp`: a filter is installed.
const SECCOMP_MODE_FILTER: u32 = 2;

/// Everything about io_uring itself.
pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![io_uring(facts), operations(facts)];
    checks.extend(Feature::ALL.map(|feature| self::feature(facts, feature)));
    checks
}

fn io_uring(facts: &Facts) -> Check {
    let check = Check::ok("io-uring", "io_uring may be used", settings(facts)).needed_for(&ModeName::DIRECT);
    match facts.setup {
        Outcome::Works => check,
        Outcome::Failed { errno, .. } => {
            let (why, change) = refusal(facts, errno);
            check.missing(why, change)
        }
        Outcome::NotTried => check.with_status(Status::NotTried),
    }
}

fn settings(facts: &Facts) -> String {
    let sysctl = &facts.sysctl;
    let disabled = match sysctl.io_uring_disabled {
        Some(0) => "kernel.io_uring_disabled is 0 (everybody may)".to_owned(),
        Some(1) => format!(
            "kernel.io_uring_disabled is 1 (group {} and CAP_SYS_ADMIN only; this process {})",
            sysctl.io_uring_group.unwrap_or(-1),
            if sysctl.in_group || facts.has_sys_admin { "qualifies" } else { "does not qualify" }
        ),
        Some(2) => "kernel.io_uring_disabled is 2 (nobody may)".to_owned(),
        Some(other) => format!("kernel.io_uring_disabled is {other}"),
        None => "there is no setting kernel.io_uring_disabled".to_owned(),
    };
    let seccomp =
        if facts.seccomp_mode == Some(SECCOMP_MODE_FILTER) { "a seccomp filter" } else { "no seccomp filter" };
    format!("{disabled}; {seccomp}")
}

/// Why `io_uring_setup(2)` refuses even the simplest ring, and what to change.
fn refusal(facts: &Facts, errno: Option<i32>) -> (String, Vec<String>) {
    let sysctl = &facts.sysctl;
    let filtered = facts.seccomp_mode == Some(SECCOMP_MODE_FILTER);
    match (errno, sysctl.io_uring_disabled) {
        (Some(EPERM), Some(2)) => (
            "kernel.io_uring_disabled is 2: nobody may make rings, root included".to_owned(),
            vec![
                "allow everybody: sysctl kernel.io_uring_disabled=0".to_owned(),
                "allow one group: sysctl kernel.io_uring_disabled=1 kernel.io_uring_group=GID, and run the broker in that \
                 group"
                    .to_owned(),
                "and write it to a file in /etc/sysctl.d/ to keep it".to_owned(),
            ],
        ),
        (Some(EPERM), Some(1)) if !sysctl.in_group && !facts.has_sys_admin => group_refusal(sysctl.io_uring_group),
        (Some(EPERM), _) if filtered => {
            ("a seccomp filter refuses io_uring_setup (EPERM), although the kernel's settings allow it".to_owned(), allow_in_containers())
        }
        (Some(ENOSYS), Some(_)) if filtered => {
            ("a seccomp filter hides io_uring_setup (ENOSYS), although the kernel has it".to_owned(), allow_in_containers())
        }
        (Some(ENOSYS), None) if filtered => {
            let mut change = allow_in_containers();
            change.push("if the kernel itself has none: one with CONFIG_IO_URING=y".to_owned());
            ("io_uring_setup is not there (ENOSYS): the seccomp filter hides it, or the kernel has no io_uring".to_owned(), change)
        }
        (Some(ENOSYS), _) => (
            "this kernel has no io_uring (ENOSYS); a sandbox that emulates Linux may have none either".to_owned(),
            vec!["use a kernel with CONFIG_IO_URING=y".to_owned()],
        ),
        (Some(errno @ (EPERM | EACCES)), _) => (
            format!("io_uring_setup is refused ({}) and no setting of io_uring says so: a security module does", name(errno)),
            vec!["allow io_uring to the broker in the policy of SELinux (class io_uring), AppArmor or the module in use".to_owned()],
        ),
        (Some(ENOMEM), _) => (
            "there is no memory for even a small ring (ENOMEM): RLIMIT_MEMLOCK or the memory control group is used up".to_owned(),
            vec!["see the line on pinned memory below".to_owned()],
        ),
        (Some(errno @ (EMFILE | ENFILE)), _) => (
            format!("there are too many open files ({})", name(errno)),
            vec!["raise RLIMIT_NOFILE (ulimit -n) or fs.file-max".to_owned()],
        ),
        (errno, _) => (
            format!("io_uring_setup fails: {}", name(errno.unwrap_or(EINVAL))),
            vec!["see io_uring_setup(2) for this error".to_owned()],
        ),
    }
}

fn group_refusal(group: Option<i64>) -> (String, Vec<String>) {
    let (why, join) = match group {
        Some(gid) if gid >= 0 => (
            format!("kernel.io_uring_disabled is 1 and this process is not in group {gid} (kernel.io_uring_group)"),
            format!(
                "run the broker in group {gid}: Group={gid} or SupplementaryGroups={gid} in a systemd unit, or usermod -aG"
            ),
        ),
        _ => (
            "kernel.io_uring_disabled is 1 and kernel.io_uring_group names no group".to_owned(),
            "name one: sysctl kernel.io_uring_group=GID, and run the broker in it".to_owned(),
        ),
    };
    (why, vec![join, "or allow everybody: sysctl kernel.io_uring_disabled=0".to_owned()])
}

/// How the usual container engines are told to let io_uring through.
fn allow_in_containers() -> Vec<String> {
    [
        "take the engine's default seccomp profile and add io_uring_setup, io_uring_enter and io_uring_register to it:",
        "Docker: docker run --security-opt seccomp=PROFILE.json",
        "Podman: podman run --security-opt seccomp=PROFILE.json (default: /usr/share/containers/seccomp.json)",
        "containerd: nerdctl run --security-opt seccomp=PROFILE.json",
        "Kubernetes: the file in /var/lib/kubelet/seccomp/ on the node, and in the pod securityContext: seccompProfile: \
         {type: Localhost, localhostProfile: PROFILE.json}",
        "elsewhere: SystemCallFilter=@aio in the systemd unit, or the sandbox's own list",
    ]
    .map(str::to_owned)
    .to_vec()
}

fn operations(facts: &Facts) -> Check {
    let policy = Policy::direct(Access::ReadWrite);
    let title = "operations of the direct policy";
    let check = |detail: String| Check::ok("operations", title, detail).needed_for(&ModeName::DIRECT);
    match &facts.support {
        None if facts.setup == Outcome::Works => check(policy.operations().to_string()).missing(
            "the kernel does not tell which operations it has, or takes no restrictions: it is older than Linux 5.10",
            vec!["use Linux 6.10 or later".to_owned()],
        ),
        None => check(policy.operations().to_string()).with_status(Status::NotTried),
        Some(support) => match policy.compile(support) {
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
        Need::Nobody => &[],
    });
    let (step, errno) = match facts.outcome(feature) {
        Outcome::Works => return check,
        Outcome::NotTried => return check.with_status(Status::NotTried),
        Outcome::Failed { step, errno } => (step, *errno),
    };
    let (cause, change) = match errno {
        None => (format!("{step} did not happen"), format!("use another kernel; this one is at fault ({since})")),
        Some(ENOMEM) => (
            format!("{step}: {}", name(ENOMEM)),
            "raise RLIMIT_MEMLOCK (see the line on pinned memory), or the memory control group's limit".to_owned(),
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
