//! What a kernel supports, as far as policies depend on it.

use core::fmt;

use crate::{
    operation::{LinuxVersion, Operation, RegisterOperation},
    reach,
    set::{OperationSet, RegisterOperationSet},
};

/// The operations that one kernel supports, among those that a policy can name.
///
/// This crate makes no system calls: the owner of the ring asks the kernel (with `IORING_REGISTER_PROBE`, and with
/// trials of restriction tables of one entry).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelSupport {
    /// The SQE operations that the kernel executes.
    pub operations: OperationSet,
    /// The register operations that the kernel accepts in a restriction table.
    pub register_operations: RegisterOperationSet,
    /// The SQE operations that the kernel has a number for, configured or not: those below its `IORING_OP_LAST`.
    /// An SQE with another number fails with `EINVAL` before the kernel checks the restrictions.
    pub numbered: OperationSet,
    /// The SQE operations that may carry `IOSQE_BUFFER_SELECT`. On any other operation the flag fails with `EOPNOTSUPP`
    /// before the kernel checks the restrictions.
    pub buffer_select: OperationSet,
    /// How the kernel interprets a table that has rules of one class only.
    pub semantics: RestrictionSemantics,
}

impl KernelSupport {
    /// What an upstream kernel of this release supports if everything is configured, by this crate's tables.
    ///
    /// Use this to check a policy on another machine than the one it is for. Correct for Linux 5.10 and later.
    #[must_use]
    pub fn upstream(version: LinuxVersion) -> Self {
        let has = |since: Option<LinuxVersion>| since.is_some_and(|since| since <= version);
        let operations: OperationSet = Operation::named().filter(|operation| has(operation.since())).collect();
        Self {
            operations,
            register_operations: RegisterOperation::named().filter(|operation| has(operation.since())).collect(),
            numbered: operations,
            buffer_select: Operation::named().filter(|&operation| has(reach::buffer_select_since(operation))).collect(),
            semantics: RestrictionSemantics::of(version),
        }
    }
}

/// How a kernel interprets a restriction table that has rules of one class (SQE or register) only.
///
/// Kernel commit d6406c45f148 changed this; Linux 7.0 is the first release with the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RestrictionSemantics {
    /// Any table denies everything that it does not list, in both classes (Linux 5.10 to 6.19).
    BeforeLinux7,
    /// A class without a rule is not restricted (from Linux 7.0).
    FromLinux7,
}

impl RestrictionSemantics {
    /// The semantics of an upstream release.
    #[must_use]
    pub fn of(version: LinuxVersion) -> Self {
        if version >= (LinuxVersion { major: 7, minor: 0 }) { Self::FromLinux7 } else { Self::BeforeLinux7 }
    }
}

impl fmt::Display for RestrictionSemantics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BeforeLinux7 => "before Linux 7.0 (what is not listed is denied)",
            Self::FromLinux7 => "from Linux 7.0 (a class without a rule is unrestricted)",
        })
    }
}
