//! The policies that a ring accepts.

use ringpass_restrictions::{CompiledPolicy, Mode, Severity};

use super::RingError;
use crate::kernel;

/// Refuses a policy with lint errors for the running kernel, unless the embedder has accepted them.
pub(crate) fn refuse_unsafe(policy: &CompiledPolicy) -> Result<(), RingError> {
    if policy.is_unsafe_accepted() {
        return Ok(());
    }
    let findings = policy.policy().lint(&kernel::lint_context(Mode::Direct, policy.semantics()));
    let errors: Vec<_> = findings.into_iter().filter(|finding| finding.severity == Severity::Error).collect();
    if errors.is_empty() { Ok(()) } else { Err(RingError::UnsafePolicy { errors }) }
}

#[cfg(test)]
mod tests {
    use ringpass_restrictions::{Access, KernelSupport, LinuxVersion, Operation, Policy, RegisterOperation, SqeFlags};

    use super::*;

    fn compiled(policy: Policy) -> CompiledPolicy {
        policy.compile(&KernelSupport::upstream(LinuxVersion { major: 6, minor: 18 })).unwrap()
    }

    #[test]
    fn a_policy_with_lint_errors_is_refused_with_their_names_until_they_are_accepted() {
        let bad = Policy::direct(Access::ReadWrite).allow(Operation::OPENAT).with_flags_required(SqeFlags::empty());
        let error = refuse_unsafe(&compiled(bad)).unwrap_err().to_string();
        for name in ["IORING_OP_OPENAT (files-outside-table)", "IORING_OP_READ_FIXED (no-fixed-file)"] {
            assert!(error.contains(name), "{error}");
        }
        assert!(error.contains("--allow-unsafe-policy"), "{error}");
        refuse_unsafe(&compiled(bad).accept_unsafe()).unwrap();
    }

    #[test]
    fn a_policy_without_lint_errors_is_accepted() {
        for access in [Access::ReadWrite, Access::ReadOnly] {
            refuse_unsafe(&compiled(Policy::direct(access))).unwrap();
        }
        let few = Policy::direct(Access::ReadOnly).allow_register(RegisterOperation::REGISTER_PROBE);
        refuse_unsafe(&compiled(few)).unwrap();
    }
}
