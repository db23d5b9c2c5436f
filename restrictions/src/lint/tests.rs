use proptest::prelude::*;

use super::*;
use crate::{Access, BuiltIn, FieldRules, OffsetWindow};

fn any_kernel(mode: Mode) -> LintContext {
    LintContext { mode, semantics: None, nop: NopHole::Unknown }
}

fn errors(policy: &Policy) -> Vec<(Lint, String)> {
    let findings = policy.lint(&any_kernel(Mode::Direct));
    let errors = findings.into_iter().filter(|finding| finding.severity == Severity::Error);
    errors.map(|finding| (finding.lint, finding.subject)).collect()
}

fn direct() -> Policy {
    Policy::direct(Access::ReadWrite)
}

#[test]
fn the_built_in_policies_have_no_errors_in_the_mode_they_are_for() {
    for built_in in BuiltIn::ALL {
        let policy = built_in.policy();
        let findings = policy.lint(&LintContext::for_any_kernel(&policy));
        assert!(findings.iter().all(|finding| finding.severity < Severity::Error), "{built_in:?}: {findings:?}");
        if let BuiltIn::Mediated(_) = built_in {
            assert_eq!(findings, [], "{built_in:?}");
        }
    }
}

#[test]
fn lint_names_each_field_rule_of_the_mediated_policies_in_direct_mode() {
    let policy = Policy::mediated(Access::ReadOnly);
    let rules: Vec<String> = policy.fields().rules().map(|rule| rule.to_string()).collect();
    let found: Vec<String> = errors(&policy)
        .into_iter()
        .map(|(lint, subject)| {
            assert_eq!(lint, Lint::NotEnforceable);
            subject
        })
        .collect();
    assert_eq!(found, rules);
}

/// Policies that are dangerous in practice, each with the one lint that names the danger.
#[test]
fn every_dangerous_policy_triggers_its_lint() {
    let with = |operation| direct().allow(operation);
    for (policy, name, subject) in [
        (with(Operation::READ), "raw-addresses", "IORING_OP_READ"),
        (with(Operation::WRITE), "raw-addresses", "IORING_OP_WRITE"),
        (with(Operation::READV), "raw-addresses", "IORING_OP_READV"),
        (direct().with_flags_required(SqeFlags::empty()), "no-fixed-file", "IORING_OP_READ_FIXED"),
        (with(Operation::OPENAT), "files-outside-table", "IORING_OP_OPENAT"),
        (with(Operation::URING_CMD), "uring-cmd", "IORING_OP_URING_CMD"),
        (with(Operation::SPLICE), "splice", "IORING_OP_SPLICE"),
        (with(Operation::TEE), "splice", "IORING_OP_TEE"),
        (with(Operation::PROVIDE_BUFFERS), "provided-buffers", "IORING_OP_PROVIDE_BUFFERS"),
        (
            direct().with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::BUFFER_SELECT),
            "provided-buffers",
            "IOSQE_BUFFER_SELECT",
        ),
        (with(Operation::MSG_RING), "msg-ring", "IORING_OP_MSG_RING"),
        (with(Operation::NOP), "nop", "IORING_OP_NOP"),
        (with(Operation::READV_FIXED), "vectored-fixed", "IORING_OP_READV_FIXED"),
        (with(Operation::WRITEV_FIXED), "vectored-fixed", "IORING_OP_WRITEV_FIXED"),
        (with(Operation::FSYNC), "unbounded-work", "IORING_OP_FSYNC"),
        (with(Operation::FALLOCATE), "unbounded-work", "IORING_OP_FALLOCATE"),
        (with(Operation::FALLOCATE), "file-size", "IORING_OP_FALLOCATE"),
        (with(Operation::SENDMSG), "network", "IORING_OP_SENDMSG"),
        (with(Operation::WAITID), "processes", "IORING_OP_WAITID"),
        (with(Operation::new(200)), "unknown-operation", "IORING_OP 200"),
        (with(Operation::SYNC_FILE_RANGE), "unbounded-work", "IORING_OP_SYNC_FILE_RANGE"),
        (with(Operation::POLL_ADD), "unbounded-work", "IORING_OP_POLL_ADD"),
        (with(Operation::TIMEOUT), "unbounded-work", "IORING_OP_TIMEOUT"),
        (with(Operation::NOP), "completion-flood", "IORING_OP_NOP"),
        (with(Operation::ASYNC_CANCEL), "completion-flood", "IORING_OP_ASYNC_CANCEL"),
        (direct().with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::ASYNC), "async-flag", "IOSQE_ASYNC"),
        (direct().with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::IO_DRAIN), "ordered-requests", "IOSQE_IO_DRAIN"),
        (direct().with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::IO_LINK), "ordered-requests", "IOSQE_IO_LINK"),
        (
            direct().with_flags_required(SqeFlags::FIXED_FILE | SqeFlags::IO_HARDLINK),
            "ordered-requests",
            "IOSQE_IO_HARDLINK",
        ),
        (Policy::new().allow(Operation::READ_FIXED), "empty-register-class", "register operations"),
        (Policy::new().allow_register(RegisterOperation::REGISTER_EVENTFD), "empty-operation-class", "SQE operations"),
        (direct().with_flags_allowed(SqeFlags::empty()), "contradiction", "IOSQE_FIXED_FILE"),
        (direct().with_flags_allowed(SqeFlags::from_bits_retain(0x81)), "contradiction", "undefined 0x80"),
    ] {
        let found = errors(&policy);
        assert!(
            found.iter().any(|(lint, about)| lint.name() == name && about == subject),
            "{name} {subject}: {found:?}"
        );
    }
}

#[test]
fn only_reads_and_writes_with_registered_buffers_are_no_error() {
    for operation in Operation::named() {
        let policy = only(operation);
        let is_harmless = [Operation::READ_FIXED, Operation::WRITE_FIXED].contains(&operation);
        assert_eq!(errors(&policy).is_empty(), is_harmless, "{operation}: {:?}", errors(&policy));
    }
}

/// A policy for one operation on the files of the table.
fn only(operation: Operation) -> Policy {
    Policy::new()
        .allow(operation)
        .with_flags_allowed(SqeFlags::FIXED_FILE)
        .with_flags_required(SqeFlags::FIXED_FILE)
        .allow_register(RegisterOperation::REGISTER_EVENTFD)
}

#[test]
fn a_policy_that_accepts_everything_has_the_same_errors_where_a_guest_escapes() {
    for operation in Operation::named() {
        let strict = only(operation);
        let lax = strict.with_accepted(Accepted::all());
        let reaches_out = !operation.facts().unwrap().reach.difference(Reach::UNBOUNDED_MEMORY).is_empty();
        let is_special = special(operation).next().is_some();
        assert_eq!(!errors(&lax).is_empty(), reaches_out || is_special, "{operation}: {:?}", errors(&lax));
        let remaining: Vec<_> = errors(&strict).into_iter().filter(|(lint, _)| lint.acceptance().is_none()).collect();
        assert_eq!(errors(&lax), remaining);
    }
}

#[test]
fn an_accepted_error_is_a_warning_that_says_so() {
    let policy = direct()
        .with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::IO_DRAIN)
        .with_accepted(Accepted::ORDERED_REQUESTS);
    let findings = policy.lint(&any_kernel(Mode::Direct));
    let finding = findings.iter().find(|finding| finding.lint == Lint::OrderedRequests).unwrap();
    assert_eq!((finding.severity, finding.is_accepted), (Severity::Warning, true));
    assert_eq!(
        finding.to_string(),
        "warning[ordered-requests]: IOSQE_IO_DRAIN: lets the guest hang its own ring: nothing starts before all earlier \
         requests have ended (the policy accepts this error)"
    );
    assert!(findings.iter().all(|finding| finding.is_accepted == (finding.lint == Lint::OrderedRequests)));
}

#[test]
fn an_acceptance_without_need_is_a_note() {
    let findings = direct().with_accepted(Accepted::ASYNC_FLAG).lint(&any_kernel(Mode::Direct));
    let unused = findings.iter().find(|finding| finding.lint == Lint::UnusedAcceptance).unwrap();
    assert_eq!((unused.severity, unused.subject.as_str()), (Severity::Note, "async-flag"));
}

#[test]
fn orders_and_floods_are_warnings_in_mediated_mode() {
    let unlimited = FieldRules { max_outstanding: None, ..Policy::mediated(Access::ReadWrite).fields() };
    let policy = Policy::mediated(Access::ReadWrite)
        .allow(Operation::NOP)
        .with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::IO_LINK);
    let severity = |policy: Policy, lint| {
        let findings = policy.lint(&any_kernel(Mode::Mediated));
        findings.into_iter().find(|finding| finding.lint == lint).unwrap().severity
    };
    assert_eq!(severity(policy, Lint::OrderedRequests), Severity::Warning);
    assert_eq!(severity(policy, Lint::CompletionFlood), Severity::Note, "the limit bounds it");
    assert_eq!(severity(policy.with_fields(unlimited), Lint::CompletionFlood), Severity::Warning);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    /// The operations and flags come from the whole range and, more often, from those that lint lets through.
    #[test]
    fn a_policy_without_errors_in_direct_mode_has_no_unbounded_operation_and_no_order_but_accepted_ones(
        codes in prop::collection::vec(prop_oneof![Just(4u8), Just(5), Just(0), Just(3), Just(14), any::<u8>()], 1..4),
        allowed in prop_oneof![Just(0u8), (0..7u32).prop_map(|bit| 1 << bit), any::<u8>()],
        required in prop_oneof![3 => Just(0u8), 1 => (0..7u32).prop_map(|bit| 1 << bit)],
        accepted in prop_oneof![Just(0u8), any::<u8>()],
        nop in prop_oneof![Just(NopHole::Open), Just(NopHole::Closed), Just(NopHole::Unknown)],
    ) {
        let required = SqeFlags::from_bits_retain(required) | SqeFlags::FIXED_FILE;
        let policy = Policy::new()
            .with_flags_allowed(SqeFlags::from_bits_retain(allowed) | required)
            .with_flags_required(required)
            .allow_register(RegisterOperation::REGISTER_EVENTFD)
            .with_accepted(Accepted::from_bits_retain(accepted));
        let policy = codes.into_iter().fold(policy, |policy, code| policy.allow(Operation::new(code)));
        let findings = policy.lint(&any_kernel(Mode::Direct).nop(nop));
        if findings.iter().any(|finding| finding.severity == Severity::Error) {
            return Ok(());
        }
        let accepts = |acceptance| policy.accepted().contains(acceptance);
        for operation in policy.operations().iter() {
            let is_bounded = match operation.facts().map(|facts| facts.ends) {
                Some(Ends::WithDevice) => true,
                Some(Ends::AtOnce) => accepts(Accepted::COMPLETION_FLOOD),
                Some(Ends::WithWorker | Ends::WithEvent) => accepts(Accepted::UNBOUNDED_WORK),
                None => false,
            };
            prop_assert!(is_bounded, "{} is in {:?}", operation, policy);
        }
        let ordered = SqeFlags::IO_DRAIN | SqeFlags::IO_LINK | SqeFlags::IO_HARDLINK;
        let flags = policy.flags_allowed() | policy.flags_required();
        prop_assert!(!flags.intersects(ordered) || accepts(Accepted::ORDERED_REQUESTS), "{:?}", policy);
        prop_assert!(!flags.contains(SqeFlags::ASYNC) || accepts(Accepted::ASYNC_FLAG), "{:?}", policy);
    }
}

#[test]
fn nop_is_an_error_if_its_hole_is_open_or_unknown() {
    let policy = direct().allow(Operation::NOP);
    let severity = |nop| {
        let context = LintContext { nop, ..any_kernel(Mode::Direct) };
        policy.lint(&context).into_iter().find(|finding| finding.lint == Lint::Nop).unwrap().severity
    };
    assert_eq!(severity(NopHole::Open), Severity::Error);
    assert_eq!(severity(NopHole::Unknown), Severity::Error);
    assert_eq!(severity(NopHole::Closed), Severity::Warning);
}

#[test]
fn an_empty_register_class_is_an_error_from_linux_7_and_a_warning_before() {
    let empty = Policy::new().allow(Operation::READ_FIXED);
    let optional = empty.allow_register_if_known(RegisterOperation::REGISTER_CLONE_BUFFERS);
    let severity = |policy: &Policy, semantics| {
        let context = LintContext { semantics, ..any_kernel(Mode::Direct) };
        policy.lint(&context).into_iter().find(|finding| finding.lint == Lint::EmptyRegisterClass).unwrap().severity
    };
    assert_eq!(severity(&empty, None), Severity::Error);
    assert_eq!(severity(&empty, Some(RestrictionSemantics::FromLinux7)), Severity::Error);
    assert_eq!(severity(&empty, Some(RestrictionSemantics::BeforeLinux7)), Severity::Warning);
    assert_eq!(severity(&optional, None), Severity::Warning);
}

#[test]
fn a_flush_is_no_error_in_mediated_mode_with_a_limit_on_requests() {
    let flush = |fields| Policy::mediated(Access::ReadWrite).allow(Operation::FSYNC).with_fields(fields);
    let severity = |policy: Policy| {
        let findings = policy.lint(&any_kernel(Mode::Mediated));
        findings.into_iter().find(|finding| finding.lint == Lint::UnboundedWork).unwrap().severity
    };
    let limited = Policy::mediated(Access::ReadWrite).fields();
    assert_eq!(severity(flush(limited)), Severity::Note);
    assert_eq!(severity(flush(FieldRules { max_outstanding: None, ..limited })), Severity::Error);
}

#[test]
fn lint_warns_of_operations_that_mediated_mode_always_refuses() {
    let policy = Policy::mediated(Access::ReadWrite).allow(Operation::POLL_REMOVE);
    let findings = policy.lint(&any_kernel(Mode::Mediated));
    assert!(findings.iter().any(|finding| finding.lint == Lint::NeverAllowed), "{findings:?}");
}

#[test]
fn an_impossible_rule_is_a_contradiction() {
    let policy = Policy::direct(Access::ReadOnly).with_offset_window(OffsetWindow { start_bytes: 0, len_bytes: 0 });
    let findings = policy.lint(&any_kernel(Mode::Mediated));
    assert!(
        findings.iter().any(|f| f.lint == Lint::Contradiction && f.subject == "fields.offset_window"),
        "{findings:?}"
    );
}

#[test]
fn findings_are_sorted_by_severity_and_displayed_as_lines() {
    let findings = direct().allow(Operation::READ).lint(&any_kernel(Mode::Direct));
    assert!(findings.is_sorted_by_key(|finding| core::cmp::Reverse(finding.severity)));
    assert_eq!(
        findings[0].to_string(),
        "error[raw-addresses]: IORING_OP_READ: lets the guest read files into memory at any address; reaches any address \
         of the ring's owner, to write"
    );
}

#[test]
fn every_lint_has_its_own_name_and_a_reason() {
    let names: std::collections::BTreeSet<&str> = Lint::ALL.iter().map(|lint| lint.name()).collect();
    assert_eq!(names.len(), Lint::ALL.len());
    for lint in Lint::ALL {
        assert!(lint.name().chars().all(|char| char.is_ascii_lowercase() || char == '-'), "{lint}");
        assert!(lint.why().ends_with('.'), "{lint}");
    }
}
