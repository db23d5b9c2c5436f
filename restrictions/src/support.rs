//! What a kernel knows, as far as a policy needs it.

use core::fmt;

use crate::set::{OperationSet, RegisterOperationSet};

/// What one kernel knows of the operations a policy can name.
///
/// This crate makes no system calls: whoever owns the ring asks the kernel (`IORING_REGISTER_PROBE`, and trials of
/// one-entry restriction tables).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelSupport {
    /// The SQE operations the kernel executes.
    pub operations: OperationSet,
    /// The register operations the kernel takes in a restriction table.
    pub register_operations: RegisterOperationSet,
    /// How the kernel reads a table that has rules of one class only.
    pub semantics: RestrictionSemantics,
}

/// How a kernel reads a restriction table that has rules of one class (SQE or register) only.
///
/// Changed by kernel commit d6406c45f148, first released with Linux 7.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RestrictionSemantics {
    /// Any table denies everything it does not list, in both classes (Linux 5.10 to 6.19).
    BeforeLinux7,
    /// A class without a rule is not restricted (from Linux 7.0).
    FromLinux7,
}

impl fmt::Display for RestrictionSemantics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BeforeLinux7 => "before Linux 7.0 (what is not listed is denied)",
            Self::FromLinux7 => "from Linux 7.0 (a class without a rule is unrestricted)",
        })
    }
}
