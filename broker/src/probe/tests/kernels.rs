//! Reports of kernels that lack abilities or have known holes.

use nix::libc::{EINVAL, ENOMEM};
use ringpass_restrictions::{Operation, RegisterOperation};

use super::super::*;
use super::{assert_no_direct, fails, good, kernel, support_failed};

#[test]
fn a_kernel_before_6_5_gets_the_version_to_use() {
    let mut facts = good();
    facts.kernel = kernel("6.1.147");
    facts.support.as_mut().unwrap().register_operations =
        (0..=RegisterOperation::REGISTER_FILE_ALLOC_RANGE.code()).map(RegisterOperation::new).collect();
    let lacking = [
        Feature::NoSqArray,
        Feature::CallerMemory,
        Feature::ScatteredCallerMemory,
        Feature::ClonedBuffers,
        Feature::ClonedBufferSlots,
    ];
    lacking.into_iter().for_each(|feature| fails(&mut facts, feature, EINVAL));
    let report = Report::judge(&facts);
    let guest_ram = report.mode(ModeName::DirectGuestRam).unwrap();
    assert_eq!(
        guest_ram.why.as_deref(),
        Some(
            "rings without an SQ array: io_uring_setup: Invalid argument (os error 22); without it, the ring does not \
             have the layout that guests expect; \
             rings in memory of the caller: io_uring_setup: Invalid argument (os error 22); without it, rings cannot \
             be in guest RAM; \
             rings in scattered memory of the caller: io_uring_setup: Invalid argument (os error 22); without it, only \
             rings of one page, or in guest RAM on huge pages, could be in guest RAM"
        )
    );
    assert_eq!(
        guest_ram.change,
        [
            "use a kernel that has it: IORING_SETUP_NO_SQARRAY, Linux 6.6",
            "use a kernel that has it: IORING_SETUP_NO_MMAP, Linux 6.5",
            "use a kernel that has it: IORING_SETUP_NO_MMAP with pages that are not contiguous, Linux 6.10",
        ]
    );
    let window = report.mode(ModeName::DirectWindow).unwrap();
    assert_eq!(window.change, ["use a kernel that has it: IORING_SETUP_NO_SQARRAY, Linux 6.6"]);
    assert_eq!(report.check("operations").unwrap().status, Status::Ok, "cloning is optional");
}

#[test]
fn a_kernel_that_needs_contiguous_ring_memory_still_has_the_window() {
    let mut facts = good();
    facts.kernel = kernel("6.6.145");
    fails(&mut facts, Feature::ScatteredCallerMemory, EINVAL);
    let report = Report::judge(&facts);
    assert!(!report.mode(ModeName::DirectGuestRam).unwrap().available);
    assert!(report.mode(ModeName::DirectWindow).unwrap().available);
}

#[test]
fn a_missing_optional_feature_refuses_no_mode_and_names_the_loss() {
    for (feature, lost) in [
        (Feature::SubmissionPolling, "every submission needs a doorbell and a system call of the broker (kick mode)"),
        (Feature::UnprivilegedSubmissionPolling, "an unprivileged broker is left with kick mode"),
        (Feature::SharedSubmissionThread, "each polled queue takes a CPU of its own"),
        (Feature::ClonedBuffers, "each further queue pins the guest's RAM again, and is charged for it again"),
        (Feature::ClonedBufferSlots, "memory that is plugged in at run time holds up I/O while it is pinned"),
    ] {
        let mut facts = good();
        fails(&mut facts, feature, EINVAL);
        let report = Report::judge(&facts);
        let check = report.check(feature.traits().name).unwrap();
        assert_eq!(check.status, Status::Missing);
        assert!(check.why.as_ref().unwrap().ends_with(&format!("; without it, {lost}")), "{check:?}");
        assert!(report.mode(ModeName::DirectGuestRam).unwrap().available);
    }
}

#[test]
fn a_missing_operation_refuses_direct_mode_by_name() {
    let mut facts = good();
    facts.support.as_mut().unwrap().operations.remove(Operation::WRITE_FIXED);
    assert_no_direct(
        &facts,
        "operations of the direct policy: this kernel does not know IORING_OP_WRITE_FIXED: use Linux 5.1 or \
         later, or a policy without them",
        &["use Linux 6.10 or later"],
    );
}

#[test]
fn a_kernel_before_5_10_has_no_restrictions() {
    let mut facts = Facts { support: Err(support_failed(EINVAL)), ..good() };
    facts.features.iter_mut().for_each(|(_, outcome)| *outcome = Outcome::NotTried);
    assert_no_direct(
        &facts,
        "operations of the direct policy: asking the kernel what it restricts: Invalid argument (os error 22): it is \
         older than Linux 5.10 and has no restrictions",
        &["use Linux 6.10 or later"],
    );
}

#[test]
fn another_error_of_the_query_is_not_blamed_on_an_old_kernel() {
    let report = Report::judge(&Facts { support: Err(support_failed(ENOMEM)), ..good() });
    assert_eq!(
        report.check("operations").unwrap().why.as_deref(),
        Some("asking the kernel what it restricts: Cannot allocate memory (os error 12)")
    );
}

#[test]
fn a_trial_with_the_wrong_result_is_a_defect_of_the_kernel() {
    let mut facts = good();
    facts.features[0].1 = Outcome::Failed { step: "refusing what the policy does not allow", errno: None };
    let report = Report::judge(&facts);
    let why = report.check("restrictions").unwrap().why.clone().unwrap();
    assert_eq!(
        why,
        "refusing what the policy does not allow did not happen; without it, a guest could make the host do anything"
    );
}

#[test]
fn known_holes_are_listed_with_their_fixes_and_their_reach() {
    let report = Report::judge(&Facts { kernel: kernel("6.18.37"), ..good() });
    let holes: Vec<_> = report.kernel.holes.iter().map(|hole| (hole.cve, hole.reached_by_default)).collect();
    assert_eq!(holes, [("CVE-2026-63806", false), ("CVE-2026-64426", false)]);
    assert_eq!(report.kernel.holes[1].fixed_in, ["6.18.39", "7.1.4", "7.2-rc1"]);
    assert_eq!(report.kernel.verdict, "mediated");
    let mode = report.mode(ModeName::DirectGuestRam).unwrap();
    assert!(mode.available, "available, but not the default");
    assert!(mode.notes[0].starts_with("by the kernel's version: direct mode only for guests that are trusted"));
}

#[test]
fn the_version_of_a_distributor_that_backports_is_not_trusted() {
    let report = Report::judge(&Facts { kernel: kernel("6.12.0-55.9.1.el10_0.x86_64"), ..good() });
    assert_eq!(report.kernel.backports_of.as_deref(), Some("Red Hat"));
    assert_eq!(report.kernel.verdict, "cannot-tell");
    assert!(!report.kernel.holes.is_empty());
}
