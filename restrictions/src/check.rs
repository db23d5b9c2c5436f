//! The checker: decides about an SQE under a policy, first as the kernel would, then by the rules on fields.

use core::fmt;

use crate::{
    compile::CompiledPolicy,
    fields::{BrokenField, FieldRule, FieldRules},
    operation::Operation,
    policy::Policy,
    reach,
    set::OperationSet,
    sqe::{Sqe, SqeFlags},
    support::{KernelSupport, RestrictionSemantics},
    table::{Restriction, RestrictionKind},
};

/// The decision about an SQE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The policy allows the SQE. (The operation may still fail.)
    Allowed,
    /// The SQE is refused for this reason.
    Refused(Refusal),
}

/// Why an SQE is refused. The first reasons are the kernel's, in the order of the kernel's checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// The kernel has no operation of this number.
    UnknownOperation,
    /// The operation takes SQEs of 128 bytes, but the ring's SQEs are smaller (Linux 6.19).
    WideOperation,
    /// A flag bit that io_uring does not define.
    UndefinedFlag,
    /// `IOSQE_BUFFER_SELECT` on an operation that takes no provided buffer.
    NoBufferSelect,
    /// `IOSQE_IO_DRAIN` on a ring that has seen `IOSQE_CQE_SKIP_SUCCESS` (Linux 5.17).
    DrainAfterSkip,
    /// The policy does not allow the operation.
    Operation,
    /// A flag that the policy requires is missing.
    MissingFlag,
    /// The SQE has a flag that the policy does not allow.
    ForbiddenFlag,
    /// The SQE breaks a rule on its fields.
    Field(FieldRule),
    /// `FALLOCATE` with a mode that affects more than the SQE's range, under a policy with rules on fields.
    FallocateMode,
    /// The policy has rules on fields, and this crate does not know the fields of the operation.
    UnreadableFields,
}

impl Refusal {
    /// The errno of the CQE. For the kernel's reasons it is the errno that the kernel uses.
    #[must_use]
    pub const fn errno(self) -> i32 {
        const EBADF: i32 = 9;
        const EAGAIN: i32 = 11;
        const EACCES: i32 = 13;
        const EFAULT: i32 = 14;
        const EINVAL: i32 = 22;
        const EOPNOTSUPP: i32 = 95;
        match self {
            Self::UnknownOperation | Self::WideOperation | Self::UndefinedFlag => EINVAL,
            Self::NoBufferSelect | Self::DrainAfterSkip => EOPNOTSUPP,
            Self::Operation | Self::MissingFlag | Self::ForbiddenFlag | Self::UnreadableFields => EACCES,
            Self::Field(FieldRule::FileSlots) => EBADF,
            Self::Field(FieldRule::BufferSlots) => EFAULT,
            Self::Field(FieldRule::MaxOutstanding) => EAGAIN,
            Self::Field(_) | Self::FallocateMode => EINVAL,
        }
    }

    /// Whether the restriction table is the reason. The kernel applies the reasons before it whatever the table
    /// contains.
    #[must_use]
    pub const fn is_of_restrictions(self) -> bool {
        matches!(self, Self::Operation | Self::MissingFlag | Self::ForbiddenFlag)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownOperation => f.write_str("the kernel has no such operation"),
            Self::WideOperation => {
                f.write_str("the operation takes SQEs of 128 bytes, but this ring's SQEs are smaller")
            }
            Self::UndefinedFlag => f.write_str("io_uring does not define one of the flags"),
            Self::NoBufferSelect => f.write_str("the operation takes no provided buffer (IOSQE_BUFFER_SELECT)"),
            Self::DrainAfterSkip => f.write_str("IOSQE_IO_DRAIN after IOSQE_CQE_SKIP_SUCCESS"),
            Self::Operation => f.write_str("the policy does not allow the operation"),
            Self::MissingFlag => f.write_str("a flag that the policy requires is missing"),
            Self::ForbiddenFlag => f.write_str("the policy does not allow one of the flags"),
            Self::Field(rule) => write!(f, "{rule} does not allow it"),
            Self::FallocateMode => f.write_str("the fallocate(2) mode affects more than the SQE's range"),
            Self::UnreadableFields => f.write_str("the policy has rules on fields, which cannot judge this operation"),
        }
    }
}

/// The state that a ring keeps from earlier SQEs, as far as it affects the decision about the next SQE.
///
/// The kernel records the flags of an SQE *before* it checks the restrictions, so a refused SQE counts, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingMemory {
    drain_disabled: bool,
}

/// The decision of a kernel about the SQEs of one restricted ring, by opcode and flags alone. Exact for Linux 5.17 and
/// later.
///
/// (See `io_init_req` and `io_check_restriction` in io_uring/io_uring.c. Up to 5.16 the kernel checks the restrictions
/// before `IOSQE_BUFFER_SELECT`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelRules {
    numbered: OperationSet,
    buffer_select: OperationSet,
    operations: OperationSet,
    flags_allowed: u8,
    flags_required: u8,
    is_restricted: bool,
}

impl KernelRules {
    /// Reads a table as the kernel does (`io_parse_restrictions`): operations of one class add up, each entry for flags
    /// replaces the previous entry of its kind, and the meaning of a table without any SQE rule depends on the
    /// semantics.
    #[must_use]
    pub fn of_table(entries: &[Restriction], kernel: &KernelSupport) -> Self {
        Self::of_kinds(entries.iter().map(Restriction::kind), kernel)
    }

    /// Like [`of_table`](Self::of_table), for decoded entries, which need not come from a compiled policy.
    #[must_use]
    pub fn of_kinds(entries: impl IntoIterator<Item = RestrictionKind>, kernel: &KernelSupport) -> Self {
        let mut rules = Self {
            numbered: kernel.numbered,
            buffer_select: kernel.buffer_select,
            operations: OperationSet::new(),
            flags_allowed: 0,
            flags_required: 0,
            is_restricted: kernel.semantics == RestrictionSemantics::BeforeLinux7,
        };
        let mut is_empty = true;
        for entry in entries {
            is_empty = false;
            match entry {
                RestrictionKind::RegisterOperation(_) => continue,
                RestrictionKind::Operation(operation) => rules.operations.insert(operation),
                RestrictionKind::FlagsAllowed(flags) => rules.flags_allowed = flags.bits(),
                RestrictionKind::FlagsRequired(flags) => rules.flags_required = flags.bits(),
            }
            rules.is_restricted = true;
        }
        // A table without any entry restricts both classes, on all kernels.
        rules.is_restricted |= is_empty;
        rules
    }

    fn of_policy(policy: &Policy, numbered: OperationSet, buffer_select: OperationSet) -> Self {
        Self {
            numbered,
            buffer_select,
            operations: policy.operations(),
            flags_allowed: policy.flags_allowed().bits(),
            flags_required: policy.flags_required().bits(),
            is_restricted: true,
        }
    }

    /// Decides about an SQE on a ring that has seen no `IOSQE_CQE_SKIP_SUCCESS`.
    #[inline]
    #[must_use]
    pub fn check(&self, sqe: &Sqe) -> Verdict {
        self.check_next(sqe, &mut RingMemory::default())
    }

    /// Decides about the next SQE of a ring.
    #[inline]
    #[must_use]
    pub fn check_next(&self, sqe: &Sqe, memory: &mut RingMemory) -> Verdict {
        match self.refusal(sqe, memory) {
            Some(refusal) => Verdict::Refused(refusal),
            None => Verdict::Allowed,
        }
    }

    #[inline]
    fn refusal(&self, sqe: &Sqe, memory: &mut RingMemory) -> Option<Refusal> {
        let operation = Operation::new(sqe.opcode);
        let flags = SqeFlags::from_bits_retain(sqe.flags);
        if !self.numbered.contains(operation) {
            return Some(Refusal::UnknownOperation);
        }
        if matches!(operation, Operation::NOP128 | Operation::URING_CMD128) {
            return Some(Refusal::WideOperation);
        }
        if !SqeFlags::all().contains(flags) {
            return Some(Refusal::UndefinedFlag);
        }
        if flags.contains(SqeFlags::BUFFER_SELECT) && !self.buffer_select.contains(operation) {
            return Some(Refusal::NoBufferSelect);
        }
        memory.drain_disabled |= flags.contains(SqeFlags::CQE_SKIP_SUCCESS);
        if flags.contains(SqeFlags::IO_DRAIN) && memory.drain_disabled {
            return Some(Refusal::DrainAfterSkip);
        }
        if !self.is_restricted {
            return None;
        }
        if !self.operations.contains(operation) {
            return Some(Refusal::Operation);
        }
        if sqe.flags & self.flags_required != self.flags_required {
            return Some(Refusal::MissingFlag);
        }
        if sqe.flags & !(self.flags_allowed | self.flags_required) != 0 {
            return Some(Refusal::ForbiddenFlag);
        }
        None
    }
}

/// Checks SQEs in user space: exactly the kernel's rules first, then the rules on fields.
///
/// A check takes nanoseconds, without allocation or system call. Mediated mode is based on the checker.
///
/// ```
/// use ringpass_restrictions::{Access, KernelSupport, LinuxVersion, OffsetWindow, Policy, Refusal, Sqe, Verdict};
///
/// let window = OffsetWindow { start_bytes: 0, len_bytes: 1 << 20 };
/// let policy = Policy::mediated(Access::ReadWrite).with_offset_window(window);
/// let checker = policy.checker(&KernelSupport::upstream(LinuxVersion { major: 6, minor: 18 }));
/// let read = Sqe { opcode: 4, flags: 1, off: 4096, len: 4096, ..Sqe::default() };
/// assert_eq!(checker.check(&read), Verdict::Allowed);
/// let open = Sqe { opcode: 18, ..read };
/// assert_eq!(checker.check(&open), Verdict::Refused(Refusal::Operation));
/// let beyond = Sqe { off: 1 << 20, ..read };
/// let Verdict::Refused(reason) = checker.check(&beyond) else { panic!("it is beyond the window") };
/// assert_eq!(reason.to_string(), "fields.offset_window does not allow it");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checker {
    kernel: KernelRules,
    fields: FieldRules,
}

impl Checker {
    /// Decides about an SQE on a ring that has seen no `IOSQE_CQE_SKIP_SUCCESS`.
    #[inline]
    #[must_use]
    pub fn check(&self, sqe: &Sqe) -> Verdict {
        self.check_next(sqe, &mut RingMemory::default())
    }

    /// Decides about the next SQE of a ring.
    #[inline]
    #[must_use]
    pub fn check_next(&self, sqe: &Sqe, memory: &mut RingMemory) -> Verdict {
        match self.kernel.refusal(sqe, memory) {
            Some(refusal) => Verdict::Refused(refusal),
            None => fields_verdict(&self.fields, sqe),
        }
    }

    /// Whether another request may start while `outstanding` are under way.
    #[inline]
    #[must_use]
    pub fn may_start(&self, outstanding: u32) -> bool {
        self.fields.max_outstanding.is_none_or(|max| outstanding < max)
    }

    /// The kernel's part of the rules.
    #[must_use]
    pub const fn kernel_rules(&self) -> &KernelRules {
        &self.kernel
    }
}

#[inline]
fn fields_verdict(fields: &FieldRules, sqe: &Sqe) -> Verdict {
    match fields.broken(sqe) {
        Ok(()) => Verdict::Allowed,
        Err(BrokenField::Rule(rule)) => Verdict::Refused(Refusal::Field(rule)),
        Err(BrokenField::FallocateMode) => Verdict::Refused(Refusal::FallocateMode),
        Err(BrokenField::Unreadable) => Verdict::Refused(Refusal::UnreadableFields),
    }
}

impl Policy {
    /// Decides about an SQE under this policy, on a ring that has seen no `IOSQE_CQE_SKIP_SUCCESS`, for the newest
    /// kernel that this crate knows (Linux 7.0).
    ///
    /// A policy that allows nothing refuses every SQE. [`checker`](Self::checker) decides for one given kernel, and
    /// faster.
    #[must_use]
    pub fn check(&self, sqe: &Sqe) -> Verdict {
        let rules = KernelRules::of_policy(self, reach::NUMBERED, reach::BUFFER_SELECT);
        match rules.check(sqe) {
            Verdict::Allowed => fields_verdict(&self.fields(), sqe),
            refused @ Verdict::Refused(_) => refused,
        }
    }

    /// The checker of this policy for one kernel. A policy that does not compile for that kernel has a checker, too.
    #[must_use]
    pub fn checker(&self, kernel: &KernelSupport) -> Checker {
        Checker { kernel: KernelRules::of_policy(self, kernel.numbered, kernel.buffer_select), fields: self.fields() }
    }
}

impl CompiledPolicy {
    /// The decisions of a kernel about the SQEs of a ring under this policy. `kernel` is the kernel of the compilation.
    #[must_use]
    pub fn kernel_rules(&self, kernel: &KernelSupport) -> KernelRules {
        KernelRules::of_table(self.entries(), kernel)
    }
}

#[cfg(test)]
mod tests;
