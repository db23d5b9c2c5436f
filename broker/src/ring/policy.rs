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
    use ringpass_restrictions::{
        Accepted, Access, KernelSupport, LinuxVersion, Operation, Policy, RegisterOperation, SqeFlags,
    };

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
    fn an_error_that_the_policy_itself_accepts_is_not_refused() {
        let flags = SqeFlags::FIXED_FILE | SqeFlags::IO_DRAIN;
        let policy = Policy::direct(Access::ReadWrite).allow(Operation::FSYNC).with_flags_allowed(flags);
        let error = refuse_unsafe(&compiled(policy)).unwrap_err().to_string();
        for name in ["IORING_OP_FSYNC (unbounded-work)", "IOSQE_IO_DRAIN (ordered-requests)"] {
            assert!(error.contains(name), "{error}");
        }
        let half = policy.with_accepted(Accepted::ORDERED_REQUESTS);
        let error = refuse_unsafe(&compiled(half)).unwrap_err().to_string();
        assert!(error.contains("IORING_OP_FSYNC") && !error.contains("IOSQE_IO_DRAIN"), "{error}");
        refuse_unsafe(&compiled(half.with_accepted(Accepted::all()))).unwrap();
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
