//! The checks of KVM.

use nix::libc::{EACCES, ENODEV, ENOENT};

use super::*;
use crate::kvm::{KvmRefusal, KvmSupport};

pub(super) fn kvm() -> KvmSupport {
    KvmSupport {
        irqfd: true,
        ioeventfd: true,
        statistics: true,
        dirty_ring_pages: 65536,
        kernel_ps_per_instruction: Some(400),
    }
}

/// The checks of virtual machines with this KVM.
fn machine_checks(kvm: Result<KvmSupport, KvmRefusal>) -> Vec<Check> {
    let report = Report::judge(&Facts { kvm, ..good() });
    assert!(report.mode(ModeName::DirectGuestRam).unwrap().available, "no mode depends on KVM");
    report.checks.into_iter().filter(|check| check.name.starts_with("kvm")).collect()
}

#[test]
fn a_missing_kvm_is_refused_by_its_reason_and_nothing_else_is_tried() {
    let refused = |errno| {
        let mut checks = machine_checks(Err(KvmRefusal { step: "opening /dev/kvm", errno })).into_iter();
        let first = checks.next().unwrap();
        assert_eq!(first.status, Status::Missing);
        assert!(checks.all(|check| check.status == Status::NotTried));
        (first.why.unwrap(), first.change.join("; "))
    };
    let (why, change) = refused(ENOENT);
    assert!(why.starts_with("there is no /dev/kvm"), "{why}");
    assert!(change.contains("kvm_intel") && change.contains("nested"), "{change}");
    let (why, change) = refused(EACCES);
    assert_eq!(why, "this user may not open /dev/kvm");
    assert!(change.contains("group kvm"), "{change}");
    let (why, _) = refused(ENODEV);
    assert!(why.starts_with("opening /dev/kvm failed: No such device"), "{why}");
}

#[test]
fn missing_abilities_of_kvm_are_named_with_the_loss() {
    assert!(machine_checks(Ok(kvm())).iter().all(|check| check.status == Status::Ok));
    let none = KvmSupport {
        irqfd: false,
        ioeventfd: false,
        statistics: false,
        dirty_ring_pages: 0,
        kernel_ps_per_instruction: None,
    };
    let checks = machine_checks(Ok(none));
    let missing: Vec<&str> =
        checks.iter().filter(|check| check.status == Status::Missing).map(|check| check.name).collect();
    assert_eq!(missing, ["kvm-irqfd", "kvm-ioeventfd", "kvm-statistics", "kvm-dirty-ring"]);
    assert_eq!(checks.last().unwrap().status, Status::NotTried);
    assert!(checks[1].why.as_deref().unwrap().contains("interrupt"), "{checks:?}");
}

#[test]
fn a_kvm_that_runs_guest_kernels_in_software_is_distinguished_from_others() {
    let slow = machine_checks(Ok(KvmSupport { kernel_ps_per_instruction: Some(1_000_000), ..kvm() }));
    let slow = slow.last().unwrap();
    assert_eq!(slow.status, Status::Information);
    assert!(slow.detail.starts_with("CPL 3 only"), "{}", slow.detail);
    let fast = machine_checks(Ok(kvm()));
    assert!(fast.last().unwrap().detail.starts_with("at all privilege levels"), "{fast:?}");
}
