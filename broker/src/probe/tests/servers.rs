//! The abilities that a server itself needs, whether or not it offers rings to guests.

use super::*;
use crate::engine::EngineShape;
use crate::processes::NoProc;

/// Asserts that no mode is available, for this reason, and that the advice agrees.
fn assert_nothing(facts: &Facts, why: &str, change: &str) {
    let report = Report::judge(facts);
    for name in ModeName::KERNEL_EXECUTED {
        let mode = report.mode(name).unwrap();
        assert!(!mode.available, "{name:?}");
        assert!(mode.why.as_deref().unwrap().contains(why), "{:?}", mode.why);
        assert!(mode.change.iter().any(|line| line.contains(change)), "{:?}", mode.change);
    }
    assert_eq!(report.kernel.advice, "no guest can be served here until what is missing below is available");
}

/// A machine on which the workers' rings fail at a system call.
fn without_workers(call: &'static str, errno: i32) -> Facts {
    let engine = Outcome::Failed { step: call, errno: Some(errno) };
    Facts { engine, support: Err(Outcome::NotTried), features: vec![], ..good() }
}

#[test]
fn a_filter_of_any_call_of_io_uring_leaves_nothing_and_is_named() {
    for call in ["io_uring_enter", "io_uring_register"] {
        let facts = Facts { seccomp_mode: Some(2), ..without_workers(call, EPERM) };
        let why = format!("a seccomp filter refuses {call} (EPERM)");
        assert_nothing(&facts, &why, "--security-opt seccomp=PROFILE.json");
        let facts = Facts { seccomp_mode: Some(2), ..without_workers(call, ENOSYS) };
        let why = format!("a seccomp filter hides {call} (ENOSYS)");
        assert_nothing(&facts, &why, "--security-opt seccomp=PROFILE.json");
    }
}

#[test]
fn a_group_without_a_number_is_not_recommended() {
    let mut facts = refused(EPERM);
    // As root finds it: its capabilities do not count here.
    facts.sysctl = Sysctl { io_uring_disabled: Some(1), io_uring_group: Some(-1), in_group: false };
    assert_nothing(&facts, "kernel.io_uring_group names no group", "sysctl kernel.io_uring_group=GID");
    let report = Report::judge(&facts);
    assert!(report.checks.iter().flat_map(|check| &check.change).all(|line| !line.contains("-1")), "{report:?}");
}

#[test]
fn too_little_memory_for_the_workers_rings_is_explained_with_their_size() {
    let mut facts = without_workers("io_uring_setup", ENOMEM);
    facts.server.engine = EngineShape { queues: 4, queue_size: 256, workers: Some(2) };
    facts.memlock.soft_bytes = Some(64 << 10);
    assert_nothing(&facts, "they take 72 KiB", "`ulimit -H -l 72`");
    facts.memlock.soft_bytes = None;
    assert_nothing(&facts, "there is no memory for the rings", "memory.max");
}

#[test]
fn a_server_needs_proc_and_open_files() {
    assert_nothing(&Facts { proc: Err(NoProc::for_tests()), ..good() }, "/proc is not mounted", "mount -t proc");
    let open_files = Some(OpenFiles { open: 4, limit: 20 });
    assert_nothing(&Facts { open_files, ..good() }, "RLIMIT_NOFILE is 20, 4 files are open", "LimitNOFILE=");
}

#[test]
fn guests_get_no_rings_where_the_end_of_a_ring_cannot_be_detected() {
    let facts = Facts { end_token: Err("no place for a temporary directory".into()), ..good() };
    let report = Report::judge(&facts);
    assert!(!report.mode(ModeName::DirectGuestRam).unwrap().available);
    assert!(report.mode(ModeName::Virtqueue).unwrap().available);
    let advice = &report.kernel.advice;
    assert!(advice.starts_with("virtqueues only: direct mode is not available here"), "{advice}");
}

#[test]
fn a_feature_that_lacks_memory_only_because_nothing_can_be_pinned_is_not_reported_as_missing() {
    let mut facts = good();
    facts.memlock.soft_bytes = Some(64 << 10);
    for feature in Feature::ALL {
        fails(&mut facts, feature, ENOMEM);
    }
    facts.support = Err(support_failed(ENOMEM));
    let report = Report::judge(&facts);
    let missing: Vec<_> = report.checks.iter().filter(|check| check.status == Status::Missing).collect();
    assert_eq!(missing.len(), 1, "{missing:?}");
    assert_eq!(missing[0].name, "memlock");
}

#[test]
fn a_server_that_offers_no_rings_is_not_judged_by_the_needs_of_rings() {
    let server = Server { may_offer_rings: false, ..Server::for_tests() };
    let report = run(&server).unwrap();
    assert!(report.mode(ModeName::Virtqueue).unwrap().available, "{report:?}");
    assert!(!report.mode(ModeName::DirectGuestRam).unwrap().available);
    assert_eq!(report.check("restrictions").unwrap().status, Status::NotTried);
}
