//! Reports from made-up facts: every refusal, by its words.

use nix::libc::{EACCES, EINVAL, ENOMEM, ENOSYS, EPERM};
use ringpass_restrictions::{KernelSupport, LinuxVersion, Operation, OperationSet, RegisterOperation};

use super::*;
use crate::{
    kernel::KernelRelease,
    limits::{Memlock, OpenFiles, PinnedBy},
};

#[cfg(feature = "kvm")]
mod machines;
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
fn little_lockable_memory_is_explained_with_its_holders() {
    let mut facts = good();
    facts.memlock.pinned_by = vec![PinnedBy { pid: 7, comm: "qemu".into(), pinned_bytes: 8 * MIB - 4096 }];
    let report = Report::judge(&facts);
    let check = report.check("memlock").unwrap();
    assert_eq!(
        check.detail,
        "4 KiB left of 8 MiB (RLIMIT_MEMLOCK), for all of a guest's RAM, about 1 MiB for its rings and 24 KiB for the \
         rings of the workers; pinned by this user: qemu[7] 8188 KiB"
    );
    let why = check.why.as_deref().unwrap();
    assert!(why.starts_with("not even a guest with 1 MiB of RAM can be pinned: pinning needs 2072 KiB"), "{why}");
    assert!(why.contains("qemu[7]"), "{why}");
    assert_eq!(check.change, ["raise RLIMIT_MEMLOCK to the guest's RAM and 2 MiB, or give the broker CAP_IPC_LOCK"]);
    assert!(!report.mode(ModeName::DirectGuestRam).unwrap().available);
    assert!(report.mode(ModeName::Virtqueue).unwrap().available, "it pins nothing");
}

#[test]
fn memory_without_a_limit_gets_no_note() {
    for (memlock, detail) in [
        (Memlock { soft_bytes: None, ..good().memlock }, "unlimited (RLIMIT_MEMLOCK)"),
        (Memlock { exempt: true, ..good().memlock }, "unlimited for this process (CAP_IPC_LOCK)"),
    ] {
        let report = Report::judge(&Facts { memlock, ..good() });
        assert_eq!(report.check("memlock").unwrap().detail, detail);
        assert!(report.mode(ModeName::DirectGuestRam).unwrap().notes.is_empty());
    }
}

#[test]
fn pinning_that_fails_for_lack_of_memory_points_to_the_limit() {
    let mut facts = good();
    fails(&mut facts, Feature::PinnedMemory, ENOMEM);
    assert_no_direct(
        &facts,
        "pinning memory as a fixed buffer: io_uring_setup: Cannot allocate memory (os error 12); without it, guest \
         memory cannot be used for I/O without the broker",
        &["raise RLIMIT_MEMLOCK (see the line on memory that may be pinned), or the memory control group's limit"],
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

#[test]
fn reserved_huge_pages_are_counted() {
    let huge_pages = vec![
        HugePagePool { page_bytes: 2 * MIB, total: 512, free: 12 },
        HugePagePool { page_bytes: 1024 * MIB, total: 0, free: 0 },
    ];
    let report = Report::judge(&Facts { huge_pages: Some(huge_pages), ..good() });
    let check = report.check("huge-pages").unwrap();
    assert_eq!(check.detail, "2 MiB: 12 free of 512; 1 GiB: 0 free of 0");
    assert_eq!(check.status, Status::Information);
    let none = Report::judge(&good());
    assert!(none.check("huge-pages").unwrap().detail.starts_with("none reserved (2 MiB); "));
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
