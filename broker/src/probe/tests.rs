//! Reports from made-up facts: every refusal, by its words.

use nix::libc::{EINVAL, ENOMEM, ENOSYS, EPERM};
use ringpass_restrictions::{KernelSupport, LinuxVersion, Operation, OperationSet, RegisterOperation};

use super::*;
use crate::{
    kernel::KernelRelease,
    limits::{Memlock, OpenFiles},
};

mod io_uring;
mod kernels;
#[cfg(feature = "kvm")]
mod machines;
mod memory;
mod servers;

const MIB: u64 = 1 << 20;

/// A machine on which everything works, for an ordinary user.
fn good() -> Facts {
    Facts {
        server: Server::for_tests(),
        proc: Ok(()),
        kernel: kernel("6.18.44"),
        sysctl: Sysctl { io_uring_disabled: Some(0), io_uring_group: Some(-1), in_group: false },
        has_sys_admin: false,
        seccomp_mode: Some(0),
        setup: Outcome::Works,
        engine: Outcome::Works,
        end_token: Ok(()),
        support: Ok(support()),
        features: Feature::ALL.map(|feature| (feature, Outcome::Works)).to_vec(),
        memlock: Memlock { soft_bytes: Some(8 * MIB), hard_bytes: Some(8 * MIB), exempt: false, pinned_by: vec![] },
        open_files: Some(OpenFiles { open: 4, limit: 1024 }),
        huge_pages: Some(vec![HugePagePool { page_bytes: 2 * MIB, total: 0, free: 0 }]),
        #[cfg(feature = "kvm")]
        kvm: Ok(machines::kvm()),
    }
}

fn support() -> KernelSupport {
    let mut support = KernelSupport::upstream(LinuxVersion { major: 6, minor: 18 });
    support.operations = (0..=Operation::PIPE.code()).map(Operation::new).collect();
    support.register_operations = (0..=RegisterOperation::REGISTER_QUERY.code()).map(RegisterOperation::new).collect();
    support.numbered = support.operations;
    support.buffer_select = OperationSet::new();
    support
}

/// The same machine, where io_uring_setup fails.
fn refused(errno: i32) -> Facts {
    Facts {
        setup: Outcome::Failed { step: "io_uring_setup", errno: Some(errno) },
        engine: Outcome::NotTried,
        support: Err(Outcome::NotTried),
        features: vec![],
        ..good()
    }
}

fn kernel(release: &str) -> KernelRelease {
    KernelRelease::parse(release, "#1 SMP", None).unwrap()
}

fn support_failed(errno: i32) -> Outcome {
    Outcome::Failed { step: "asking the kernel what it restricts", errno: Some(errno) }
}

fn fails(facts: &mut Facts, feature: Feature, errno: i32) {
    let outcome = &mut facts.features.iter_mut().find(|(tried, _)| *tried == feature).unwrap().1;
    *outcome = Outcome::Failed { step: "io_uring_setup", errno: Some(errno) };
}

/// Asserts that direct mode is refused in both placements, for this reason, with these changes.
fn assert_no_direct(facts: &Facts, why: &str, change: &[&str]) {
    let report = Report::judge(facts);
    for name in [ModeName::DirectGuestRam, ModeName::DirectWindow] {
        let mode = report.mode(name).unwrap();
        assert!(!mode.available);
        assert_eq!(mode.why.as_deref(), Some(why));
        assert_eq!(mode.change, change);
        assert!(mode.notes.is_empty());
    }
    let may_make_rings = report.check("io-uring").unwrap().status == Status::Ok;
    assert_eq!(report.any_mode_available(), may_make_rings, "virtqueues need no more than io_uring");
}

#[test]
fn direct_mode_is_available_here() {
    let report = run(&Server::for_tests()).unwrap();
    let works = |name: &str| assert_eq!(report.check(name).unwrap().status, Status::Ok, "{:?}", report.check(name));
    works("io-uring");
    works("operations");
    for feature in Feature::ALL {
        works(feature.traits().name);
    }
    assert!(report.mode(ModeName::DirectGuestRam).unwrap().available, "{report:?}");
    assert!(report.mode(ModeName::DirectWindow).unwrap().available, "{report:?}");
}

#[test]
fn a_good_machine_offers_direct_mode_and_tells_how_large_a_guest_may_be() {
    let report = Report::judge(&good());
    let mode = report.mode(ModeName::DirectGuestRam).unwrap();
    assert!(mode.available && mode.why.is_none() && mode.change.is_empty());
    assert_eq!(mode.notes, ["for guests of up to 7144 KiB of RAM with this RLIMIT_MEMLOCK"]);
    assert!(report.any_mode_available());
}

#[test]
fn modes_that_are_not_built_yet_are_reported_as_such() {
    let report = Report::judge(&good());
    let mode = report.mode(ModeName::Mediated).unwrap();
    assert!(!mode.available);
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(mode.why, Some(format!("this version of ringpass ({version}) does not have it yet")));
}

#[test]
fn virtqueues_need_io_uring_and_nothing_else_that_guests_rings_need() {
    let mode = Report::judge(&good()).mode(ModeName::Virtqueue).unwrap().clone();
    assert!(mode.available && mode.notes.is_empty());
    let mut facts = refused(EPERM);
    facts.sysctl.io_uring_disabled = Some(2);
    let mode = Report::judge(&facts).mode(ModeName::Virtqueue).unwrap().clone();
    assert!(!mode.available);
    assert!(mode.why.unwrap().contains("no process may make rings"));
}

#[test]
fn every_missing_ability_has_a_reason_and_a_change() {
    let mut facts = good();
    Feature::ALL.into_iter().for_each(|feature| fails(&mut facts, feature, EINVAL));
    facts.memlock.soft_bytes = Some(0);
    for report in [Report::judge(&facts), Report::judge(&refused(ENOMEM)), Report::judge(&refused(EINVAL))] {
        for check in report.checks.iter().filter(|check| check.status == Status::Missing) {
            assert!(check.why.is_some() && !check.change.is_empty(), "{check:?}");
        }
        for mode in report.modes.iter().filter(|mode| !mode.available) {
            assert!(mode.why.is_some() && !mode.change.is_empty(), "{mode:?}");
        }
    }
}

#[test]
fn the_note_on_discarded_memory_is_always_present() {
    let report = Report::judge(&good());
    for word in ["balloon", "free page reporting", "virtio-mem", "postcopy"] {
        assert!(report.notes.iter().any(|note| note.contains(word)), "{word}");
    }
}
