//! The policy: the permitted uses of a ring, as a value.

use core::fmt;

use crate::{
    accept::Accepted,
    fields::{Attributes, FieldRules, IoPrioClasses, LengthRange, OffsetWindow, RwFlags, Slots},
    operation::{Operation, RegisterOperation},
    set::{OperationSet, RegisterOperationSet},
    sqe::SqeFlags,
    support::RestrictionSemantics,
};

/// What a guest may do with its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read and write.
    ReadWrite,
    /// Read only.
    ReadOnly,
}

/// The kernels that a policy is written for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TargetSemantics {
    /// All kernels, with the semantics of the kernel that the policy is compiled for.
    #[default]
    Auto,
    /// Only kernels with these semantics: the policy does not compile for other kernels.
    Only(RestrictionSemantics),
}

/// The permitted uses of a ring.
///
/// A policy is a plain value and may contain anything, including rules that no kernel accepts:
/// [`compile`](Self::compile) checks it. `Display` states in words what the policy allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub(crate) operations: OperationSet,
    pub(crate) flags_allowed: SqeFlags,
    pub(crate) flags_required: SqeFlags,
    pub(crate) register_operations: RegisterOperationSet,
    pub(crate) register_operations_if_known: RegisterOperationSet,
    pub(crate) target: TargetSemantics,
    pub(crate) fields: FieldRules,
    pub(crate) accepted: Accepted,
}

impl Policy {
    /// A policy that allows nothing yet. It does not compile as it is.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            operations: OperationSet::new(),
            flags_allowed: SqeFlags::empty(),
            flags_required: SqeFlags::empty(),
            register_operations: RegisterOperationSet::new(),
            register_operations_if_known: RegisterOperationSet::new(),
            target: TargetSemantics::Auto,
            fields: FieldRules {
                file_slots: None,
                buffer_slots: None,
                offset_window: None,
                length_bytes: None,
                alignment_bytes: None,
                rw_flags: None,
                ioprio_classes: None,
                attributes: None,
                max_outstanding: None,
            },
            accepted: Accepted::empty(),
        }
    }

    /// The built-in policy of a ring that a hostile guest writes to.
    ///
    /// The guest may read (and write) with registered buffers on registered files: `READ_FIXED`, `WRITE_FIXED`, and
    /// exactly the flag `FIXED_FILE`. The policy contains no flush, discard or write-zeroes, because an unbounded
    /// number of them would go to io-wq and exhaust the host's memory. The ring's owner keeps the register operations
    /// that it needs while the ring runs: to exchange the completion eventfd, to empty a buffer slot when memory is
    /// unplugged, and, if the kernel supports it (Linux 6.12), to take over newly plugged memory from a spare ring.
    #[must_use]
    pub fn direct(access: Access) -> Self {
        let policy = Self::new()
            .allow(Operation::READ_FIXED)
            .with_flags_allowed(SqeFlags::FIXED_FILE)
            .with_flags_required(SqeFlags::FIXED_FILE)
            .allow_register(RegisterOperation::REGISTER_EVENTFD)
            .allow_register(RegisterOperation::UNREGISTER_EVENTFD)
            .allow_register(RegisterOperation::REGISTER_BUFFERS_UPDATE)
            .allow_register_if_known(RegisterOperation::REGISTER_CLONE_BUFFERS);
        match access {
            Access::ReadWrite => policy.allow(Operation::WRITE_FIXED),
            Access::ReadOnly => policy,
        }
    }

    /// The built-in policy of a ring whose SQEs the broker executes one by one for a guest.
    ///
    /// The policy allows a subset of [`direct`](Self::direct): the file in slot 0, whole blocks of 512 bytes up to 1
    /// GiB, no attributes, only those `RWF_*` flags that are useful for a disk, no realtime priority, and at most 65536
    /// requests at once, the size of the largest CQ. Set the window to the disk's with
    /// [`with_offset_window`](Self::with_offset_window).
    #[must_use]
    pub fn mediated(access: Access) -> Self {
        Self::direct(access).with_fields(FieldRules {
            file_slots: Some(Slots { first: 0, last: 0 }),
            buffer_slots: None,
            offset_window: None,
            length_bytes: Some(LengthRange { min: 512, max: 1 << 30 }),
            alignment_bytes: Some(512),
            rw_flags: Some(RwFlags::DSYNC | RwFlags::NOWAIT | RwFlags::DONTCACHE),
            ioprio_classes: Some(IoPrioClasses::NONE | IoPrioClasses::BEST_EFFORT | IoPrioClasses::IDLE),
            attributes: Some(Attributes::empty()),
            max_outstanding: Some(65536),
        })
    }

    /// Sets the rules on the fields of SQEs, which only a checker in user space can enforce.
    #[must_use]
    pub const fn with_fields(mut self, fields: FieldRules) -> Self {
        self.fields = fields;
        self
    }

    /// Sets the part of the file that reads and writes may access.
    #[must_use]
    pub const fn with_offset_window(mut self, window: OffsetWindow) -> Self {
        self.fields.offset_window = Some(window);
        self
    }

    /// Allows SQEs to request an operation.
    #[must_use]
    pub fn allow(mut self, operation: Operation) -> Self {
        self.operations.insert(operation);
        self
    }

    /// Sets the flags that an SQE may carry. They must include the required flags.
    #[must_use]
    pub const fn with_flags_allowed(mut self, flags: SqeFlags) -> Self {
        self.flags_allowed = flags;
        self
    }

    /// Sets the flags that every SQE must carry.
    #[must_use]
    pub const fn with_flags_required(mut self, flags: SqeFlags) -> Self {
        self.flags_required = flags;
        self
    }

    /// Leaves the ring's owner a register operation. The policy does not compile for a kernel that lacks the operation.
    #[must_use]
    pub fn allow_register(mut self, operation: RegisterOperation) -> Self {
        self.register_operations.insert(operation);
        self
    }

    /// Leaves the ring's owner a register operation if the kernel has it.
    ///
    /// [`allow_register`](Self::allow_register) of the same operation takes precedence.
    #[must_use]
    pub fn allow_register_if_known(mut self, operation: RegisterOperation) -> Self {
        self.register_operations_if_known.insert(operation);
        self
    }

    /// Sets the kernels that the policy is written for.
    #[must_use]
    pub const fn with_target(mut self, target: TargetSemantics) -> Self {
        self.target = target;
        self
    }

    /// Sets the errors of lint that the policy accepts. They become warnings.
    ///
    /// Bits without a meaning are dropped.
    #[must_use]
    pub const fn with_accepted(mut self, accepted: Accepted) -> Self {
        self.accepted = Accepted::from_bits_truncate(accepted.bits());
        self
    }

    /// The operations that an SQE may request.
    #[must_use]
    pub const fn operations(&self) -> OperationSet {
        self.operations
    }

    /// The flags that an SQE may carry.
    #[must_use]
    pub const fn flags_allowed(&self) -> SqeFlags {
        self.flags_allowed
    }

    /// The flags that every SQE must carry.
    #[must_use]
    pub const fn flags_required(&self) -> SqeFlags {
        self.flags_required
    }

    /// The register operations that the ring's owner needs.
    #[must_use]
    pub const fn register_operations(&self) -> RegisterOperationSet {
        self.register_operations
    }

    /// The optional register operations: the ring's owner keeps them if the kernel has them.
    #[must_use]
    pub fn register_operations_if_known(&self) -> RegisterOperationSet {
        self.register_operations_if_known.difference(&self.register_operations)
    }

    /// The rules on the fields of SQEs.
    #[must_use]
    pub const fn fields(&self) -> FieldRules {
        self.fields
    }

    /// The errors of lint that the policy accepts.
    #[must_use]
    pub const fn accepted(&self) -> Accepted {
        self.accepted
    }

    /// The kernels that the policy is written for.
    #[must_use]
    pub const fn target(&self) -> TargetSemantics {
        self.target
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "An SQE may request: {}", self.operations)?;
        if self.flags_allowed == self.flags_required {
            writeln!(f, "Its flags must be exactly: {}", self.flags_required)?;
        } else {
            writeln!(f, "Its flags must include: {}", self.flags_required)?;
            writeln!(f, "Its flags may include: {}", self.flags_allowed)?;
        }
        write!(f, "The ring's owner keeps: {}", self.register_operations)?;
        if !self.register_operations_if_known().is_empty() {
            write!(f, "\nThe ring's owner keeps, if the kernel has it: {}", self.register_operations_if_known())?;
        }
        if let TargetSemantics::Only(semantics) = self.target {
            write!(f, "\nFor kernels {semantics} only")?;
        }
        if !self.accepted.is_empty() {
            write!(f, "\nThe policy accepts: {}", self.accepted)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_direct_policies_allow_two_operations_or_one() {
        let read_write = Policy::direct(Access::ReadWrite);
        let read_only = Policy::direct(Access::ReadOnly);
        assert_eq!(read_write.operations().iter().collect::<Vec<_>>(), [Operation::READ_FIXED, Operation::WRITE_FIXED]);
        assert_eq!(read_only.operations().iter().collect::<Vec<_>>(), [Operation::READ_FIXED]);
        for policy in [read_write, read_only] {
            assert_eq!(policy.flags_allowed(), SqeFlags::FIXED_FILE);
            assert_eq!(policy.flags_required(), SqeFlags::FIXED_FILE);
        }
    }

    #[test]
    fn a_policy_is_displayed_in_words() {
        assert_eq!(
            Policy::direct(Access::ReadWrite).to_string(),
            "An SQE may request: IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED\n\
             Its flags must be exactly: IOSQE_FIXED_FILE\n\
             The ring's owner keeps: IORING_REGISTER_EVENTFD, IORING_UNREGISTER_EVENTFD, IORING_REGISTER_BUFFERS_UPDATE\n\
             The ring's owner keeps, if the kernel has it: IORING_REGISTER_CLONE_BUFFERS"
        );
        let other = Policy::new()
            .with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::IO_LINK)
            .with_flags_required(SqeFlags::FIXED_FILE)
            .with_target(TargetSemantics::Only(RestrictionSemantics::FromLinux7))
            .with_accepted(Accepted::ORDERED_REQUESTS);
        assert_eq!(
            other.to_string(),
            "An SQE may request: nothing\n\
             Its flags must include: IOSQE_FIXED_FILE\n\
             Its flags may include: IOSQE_FIXED_FILE + IOSQE_IO_LINK\n\
             The ring's owner keeps: nothing\n\
             For kernels from Linux 7.0 (a class without a rule is unrestricted) only\n\
             The policy accepts: ordered-requests"
        );
    }

    #[test]
    fn a_needed_operation_is_not_also_optional() {
        let policy = Policy::new()
            .allow_register_if_known(RegisterOperation::REGISTER_CLONE_BUFFERS)
            .allow_register(RegisterOperation::REGISTER_CLONE_BUFFERS);
        assert!(policy.register_operations().contains(RegisterOperation::REGISTER_CLONE_BUFFERS));
        assert!(policy.register_operations_if_known().is_empty());
    }

    #[test]
    fn undefined_flag_bits_are_shown() {
        assert_eq!((SqeFlags::ASYNC | SqeFlags::from_bits_retain(0x80)).to_string(), "IOSQE_ASYNC + undefined 0x80");
    }
}
