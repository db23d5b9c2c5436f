//! Compiles a policy into the kernel's restriction table.

use core::fmt;

use thiserror::Error;

use crate::{
    fields::FieldRules,
    operation::{LinuxVersion, Operation, RegisterOperation},
    policy::{Policy, TargetSemantics},
    set::{OperationSet, RegisterOperationSet},
    sqe::SqeFlags,
    support::{KernelSupport, RestrictionSemantics},
    table::{Restriction, RestrictionKind},
};

/// One of the two classes of rules in a restriction table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// The operations that an SQE may request.
    Operations,
    /// The operations of `io_uring_register(2)` that the ring's owner may still call.
    RegisterOperations,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Operations => "SQE operation",
            Self::RegisterOperations => "register operation",
        })
    }
}

/// Why a policy does not compile for a kernel.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CompileError {
    /// The policy needs operations that the kernel does not have.
    #[error(
        "this kernel does not know {}{}",
        UnknownNames(operations, register_operations),
        NewerKernel(operations, register_operations)
    )]
    UnknownOperations {
        /// Every SQE operation of the policy that the kernel lacks.
        operations: OperationSet,
        /// Every needed register operation of the policy that the kernel lacks.
        register_operations: RegisterOperationSet,
    },
    /// The policy allows no operation of one class on this kernel. Linux 7.0 and later would allow all of that class.
    #[error(
        "the policy allows no {class} on this kernel, and from Linux 7.0 a table without any leaves them all \
         unrestricted: allow at least one"
    )]
    EmptyClass {
        /// The class without a rule.
        class: Class,
    },
    /// A required flag is not among the allowed flags.
    #[error("the policy requires {} but allows only {allowed}: allow the required flags", required.difference(*allowed))]
    RequiredFlagNotAllowed {
        /// The flags the policy requires.
        required: SqeFlags,
        /// The flags the policy allows.
        allowed: SqeFlags,
    },
    /// A flag bit that no kernel defines.
    #[error("the policy names flag bits that io_uring does not define: {flags}")]
    UndefinedFlags {
        /// The undefined bits.
        flags: SqeFlags,
    },
    /// The policy has rules that no kernel enforces.
    #[error("the kernel cannot enforce {}: this policy is for mediated mode, not for direct mode", RuleNames(fields))]
    NeedsMediation {
        /// The rules on fields; [`FieldRules::rules`] names those that are set.
        fields: FieldRules,
    },
    /// The policy was written for kernels with other restriction semantics.
    #[error("the policy is for kernels {policy}, but this kernel has the semantics {kernel}")]
    OtherSemantics {
        /// The semantics that the policy is for.
        policy: RestrictionSemantics,
        /// The semantics of the kernel.
        kernel: RestrictionSemantics,
    },
}

/// A policy compiled for one kernel.
///
/// Its table has at least one SQE operation, at least one register operation, exactly one `SQE_FLAGS_ALLOWED` and one
/// `SQE_FLAGS_REQUIRED` entry, no duplicate entry, and no operation that the kernel does not know. The same policy and
/// kernel always give the same table: SQE operations by number, the allowed and the required flags, register operations
/// by number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompiledPolicy {
    entries: Vec<Restriction>,
    operations: OperationSet,
    register_operations: RegisterOperationSet,
    semantics: RestrictionSemantics,
    policy: Policy,
    is_unsafe_accepted: bool,
}

impl Policy {
    /// Compiles the policy for a kernel.
    ///
    /// # Errors
    ///
    /// [`CompileError`]: the kernel lacks operations that the policy needs (the error names all of them), a class would
    /// be empty, the flags contradict each other, or the policy is for other kernels or has rules that no kernel
    /// enforces.
    pub fn compile(&self, kernel: &KernelSupport) -> Result<CompiledPolicy, CompileError> {
        self.check_flags()?;
        if !self.fields.is_empty() {
            return Err(CompileError::NeedsMediation { fields: self.fields });
        }
        match self.target {
            TargetSemantics::Only(policy) if policy != kernel.semantics => {
                return Err(CompileError::OtherSemantics { policy, kernel: kernel.semantics });
            }
            _ => {}
        }
        let operations = self.operations.difference(&kernel.operations);
        let register_operations = self.register_operations.difference(&kernel.register_operations);
        if !operations.is_empty() || !register_operations.is_empty() {
            return Err(CompileError::UnknownOperations { operations, register_operations });
        }
        let known = self.register_operations_if_known.intersection(&kernel.register_operations);
        CompiledPolicy::new(self, self.register_operations.union(&known), kernel.semantics)
    }

    fn check_flags(&self) -> Result<(), CompileError> {
        let undefined = (self.flags_allowed | self.flags_required).difference(SqeFlags::all());
        if !undefined.is_empty() {
            return Err(CompileError::UndefinedFlags { flags: undefined });
        }
        if !self.flags_allowed.contains(self.flags_required) {
            return Err(CompileError::RequiredFlagNotAllowed {
                required: self.flags_required,
                allowed: self.flags_allowed,
            });
        }
        Ok(())
    }
}

impl CompiledPolicy {
    fn new(
        policy: &Policy,
        register_operations: RegisterOperationSet,
        semantics: RestrictionSemantics,
    ) -> Result<Self, CompileError> {
        if policy.operations.is_empty() {
            return Err(CompileError::EmptyClass { class: Class::Operations });
        }
        if register_operations.is_empty() {
            return Err(CompileError::EmptyClass { class: Class::RegisterOperations });
        }
        let entries = (policy.operations.iter().map(RestrictionKind::Operation))
            .chain([
                RestrictionKind::FlagsAllowed(policy.flags_allowed),
                RestrictionKind::FlagsRequired(policy.flags_required),
            ])
            .chain(register_operations.iter().map(RestrictionKind::RegisterOperation))
            .map(Restriction::new)
            .collect();
        Ok(Self {
            entries,
            operations: policy.operations,
            register_operations,
            semantics,
            policy: *policy,
            is_unsafe_accepted: false,
        })
    }

    /// The table, for `IORING_REGISTER_RESTRICTIONS`.
    #[must_use]
    pub fn entries(&self) -> &[Restriction] {
        &self.entries
    }

    /// The operations that an SQE may request.
    #[must_use]
    pub const fn operations(&self) -> OperationSet {
        self.operations
    }

    /// The register operations that the ring's owner keeps on this kernel.
    #[must_use]
    pub const fn register_operations(&self) -> RegisterOperationSet {
        self.register_operations
    }

    /// Accepts that the policy may let a guest escape: the broker's rings then take the policy despite lint errors.
    ///
    /// For tests, and for guests that are trusted as much as the owner of the ring.
    #[must_use]
    pub fn accept_unsafe(mut self) -> Self {
        self.is_unsafe_accepted = true;
        self
    }

    /// Whether [`accept_unsafe`](Self::accept_unsafe) was called.
    #[must_use]
    pub const fn is_unsafe_accepted(&self) -> bool {
        self.is_unsafe_accepted
    }

    /// The policy that this table was compiled from.
    #[must_use]
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The semantics of the kernel that this table was compiled for.
    #[must_use]
    pub const fn semantics(&self) -> RestrictionSemantics {
        self.semantics
    }
}

/// The names of the rules that are set.
struct RuleNames<'a>(&'a FieldRules);

impl fmt::Display for RuleNames<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for rule in self.0.rules() {
            write!(f, "{separator}{rule}")?;
            separator = ", ";
        }
        Ok(())
    }
}

/// The names of all unknown operations.
struct UnknownNames<'a>(&'a OperationSet, &'a RegisterOperationSet);

impl fmt::Display for UnknownNames<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.is_empty(), self.1.is_empty()) {
            (false, false) => write!(f, "{}, {}", self.0, self.1),
            (false, true) => write!(f, "{}", self.0),
            (true, _) => write!(f, "{}", self.1),
        }
    }
}

/// The advice which kernel has all of the operations, or to remove them if one of them is newer than this crate.
struct NewerKernel<'a>(&'a OperationSet, &'a RegisterOperationSet);

impl fmt::Display for NewerKernel<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let versions = (self.0.iter().map(Operation::since)).chain(self.1.iter().map(RegisterOperation::since));
        match versions.collect::<Option<Vec<LinuxVersion>>>().and_then(|versions| versions.into_iter().max()) {
            Some(newest) => write!(f, ": use {newest} or later, or a policy without them"),
            None => f.write_str(": remove them from the policy"),
        }
    }
}

#[cfg(test)]
mod tests;
