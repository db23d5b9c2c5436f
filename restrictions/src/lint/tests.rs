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
        (direct().with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::ASYNC), "async-flag", "IOSQE_ASYNC"),
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
fn an_operation_is_an_error_exactly_if_it_has_a_reach() {
    for operation in Operation::named() {
        let policy = Policy::new()
            .allow(operation)
            .with_flags_allowed(SqeFlags::FIXED_FILE)
            .with_flags_required(SqeFlags::FIXED_FILE)
            .allow_register(RegisterOperation::REGISTER_EVENTFD);
        let is_harmless =
            [Operation::READ_FIXED, Operation::WRITE_FIXED, Operation::POLL_REMOVE, Operation::ASYNC_CANCEL]
                .contains(&operation);
        assert_eq!(errors(&policy).is_empty(), is_harmless, "{operation}: {:?}", errors(&policy));
        let reach = operation.facts().unwrap().reach;
        assert!(!is_harmless || reach.is_empty(), "{operation}");
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
