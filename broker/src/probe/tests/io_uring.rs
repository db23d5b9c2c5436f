//! Reports where the kernel, its settings or a filter refuse io_uring.

use nix::libc::{EACCES, ENOSYS, EPERM};

use super::super::*;
use super::{assert_no_direct, refused};

#[test]
fn io_uring_disabled_for_all_users_is_explained() {
    let mut facts = refused(EPERM);
    facts.sysctl.io_uring_disabled = Some(2);
    facts.has_sys_admin = true;
    assert_no_direct(
        &facts,
        "io_uring: kernel.io_uring_disabled is 2: no process may make rings, root included",
        &[
            "allow all users: sysctl kernel.io_uring_disabled=0",
            "allow one group: sysctl kernel.io_uring_disabled=1 kernel.io_uring_group=GID, and run the \
             broker in that group",
            "and write it to a file in /etc/sysctl.d/ to keep it",
        ],
    );
}

#[test]
fn io_uring_for_a_group_without_this_process_is_explained() {
    let mut facts = refused(EPERM);
    facts.sysctl = Sysctl { io_uring_disabled: Some(1), io_uring_group: Some(990), in_group: false };
    assert_no_direct(
        &facts,
        "io_uring: kernel.io_uring_disabled is 1 and this process is not in group 990 (kernel.io_uring_group)",
        &[
            "run the broker in group 990: Group=990 or SupplementaryGroups=990 in a systemd unit, or usermod -aG",
            "or allow all users: sysctl kernel.io_uring_disabled=0",
        ],
    );
    facts.sysctl.io_uring_group = Some(-1);
    assert_no_direct(
        &facts,
        "io_uring: kernel.io_uring_disabled is 1 and kernel.io_uring_group names no group",
        &[
            "name one: sysctl kernel.io_uring_group=GID, and run the broker in it",
            "or allow all users: sysctl kernel.io_uring_disabled=0",
        ],
    );
}

#[test]
fn a_seccomp_filter_is_explained_with_the_remedy_for_each_container_engine() {
    let engines = ["Docker", "Podman", "containerd", "Kubernetes"];
    for (errno, disabled, why) in [
        (EPERM, Some(0), "a seccomp filter refuses io_uring_setup (EPERM), although the kernel's settings allow it"),
        (EPERM, None, "a seccomp filter refuses io_uring_setup (EPERM), although the kernel's settings allow it"),
        (ENOSYS, Some(0), "a seccomp filter hides io_uring_setup (ENOSYS), although the kernel has it"),
        (
            ENOSYS,
            None,
            "io_uring_setup does not exist (ENOSYS): the seccomp filter hides it, or the kernel has no io_uring",
        ),
    ] {
        let mut facts = refused(errno);
        facts.sysctl.io_uring_disabled = disabled;
        facts.seccomp_mode = Some(2);
        let report = Report::judge(&facts);
        let check = report.check("io-uring").unwrap();
        assert_eq!((check.status, check.why.as_deref()), (Status::Missing, Some(why)));
        for engine in engines {
            assert!(check.change.iter().any(|line| line.starts_with(engine)), "{engine} in {:?}", check.change);
        }
        assert!(check.change[0].ends_with("add io_uring_setup, io_uring_enter and io_uring_register to it:"));
    }
}

#[test]
fn the_refusal_by_group_comes_before_the_refusal_by_filter() {
    let mut facts = refused(EPERM);
    facts.sysctl = Sysctl { io_uring_disabled: Some(1), io_uring_group: Some(990), in_group: false };
    facts.seccomp_mode = Some(2);
    let why = |facts: &Facts| Report::judge(facts).check("io-uring").unwrap().why.clone().unwrap();
    assert!(why(&facts).contains("not in group 990"));
    facts.sysctl.in_group = true;
    assert!(why(&facts).starts_with("a seccomp filter refuses"));
    facts.sysctl.in_group = false;
    facts.has_sys_admin = true;
    assert!(why(&facts).starts_with("a seccomp filter refuses"));
}

#[test]
fn a_kernel_without_io_uring_is_explained() {
    let mut facts = refused(ENOSYS);
    facts.sysctl.io_uring_disabled = None;
    assert_no_direct(
        &facts,
        "io_uring: this kernel has no io_uring (ENOSYS); a sandbox that emulates Linux may also lack it",
        &["use a kernel with CONFIG_IO_URING=y"],
    );
}

#[test]
fn a_security_module_is_named_if_nothing_else_refuses() {
    for (errno, text) in [(EPERM, "Operation not permitted (os error 1)"), (EACCES, "Permission denied (os error 13)")]
    {
        assert_no_direct(
            &refused(errno),
            &format!(
                "io_uring: io_uring_setup is refused ({text}) although no setting forbids io_uring: a security \
                 module refuses it"
            ),
            &["allow io_uring to the broker in the policy of SELinux (class io_uring), AppArmor or the module in use"],
        );
    }
}

#[test]
fn an_ability_that_could_not_be_tried_is_not_reported_as_missing() {
    let report = Report::judge(&refused(EPERM));
    for feature in Feature::ALL {
        let check = report.check(feature.traits().name).unwrap();
        assert_eq!((check.status, &check.why), (Status::NotTried, &None));
    }
    assert_eq!(report.check("operations").unwrap().status, Status::NotTried);
}
