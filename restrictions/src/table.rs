//! The entries of the kernel's restriction table.

use crate::{
    operation::{Operation, RegisterOperation},
    sqe::SqeFlags,
};

/// The kernel's `struct io_uring_restriction`: 16 bytes, an array of which is the argument of
/// `IORING_REGISTER_RESTRICTIONS`.
///
/// Only this crate creates entries, so they always come from a compiled policy.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restriction {
    opcode: u16,
    value: u8,
    reserved: u8,
    reserved2: [u32; 3],
}

/// The meaning of an entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestrictionKind {
    /// `IORING_RESTRICTION_REGISTER_OP` (0): a register operation that stays allowed.
    RegisterOperation(RegisterOperation),
    /// `IORING_RESTRICTION_SQE_OP` (1): an operation that an SQE may request.
    Operation(Operation),
    /// `IORING_RESTRICTION_SQE_FLAGS_ALLOWED` (2): the flags that an SQE may carry in addition to the required flags.
    FlagsAllowed(SqeFlags),
    /// `IORING_RESTRICTION_SQE_FLAGS_REQUIRED` (3): the flags that every SQE must carry.
    FlagsRequired(SqeFlags),
}

impl Restriction {
    pub(crate) const fn new(kind: RestrictionKind) -> Self {
        let (opcode, value) = match kind {
            RestrictionKind::RegisterOperation(operation) => (0, operation.code()),
            RestrictionKind::Operation(operation) => (1, operation.code()),
            RestrictionKind::FlagsAllowed(flags) => (2, flags.bits()),
            RestrictionKind::FlagsRequired(flags) => (3, flags.bits()),
        };
        Self { opcode, value, reserved: 0, reserved2: [0; 3] }
    }

    /// The meaning of the entry.
    #[must_use]
    pub fn kind(&self) -> RestrictionKind {
        match self.opcode {
            0 => RestrictionKind::RegisterOperation(RegisterOperation::new(self.value)),
            1 => RestrictionKind::Operation(Operation::new(self.value)),
            2 => RestrictionKind::FlagsAllowed(SqeFlags::from_bits_retain(self.value)),
            _ => RestrictionKind::FlagsRequired(SqeFlags::from_bits_retain(self.value)),
        }
    }

    /// The kernel's number of the entry's kind, `IORING_RESTRICTION_*`.
    #[must_use]
    pub const fn opcode(&self) -> u16 {
        self.opcode
    }

    /// The operation's number or the flags, depending on the kind.
    #[must_use]
    pub const fn value(&self) -> u8 {
        self.value
    }
}

#[cfg(test)]
mod tests {
    use core::mem::{align_of, offset_of, size_of};

    use super::*;

    #[test]
    fn an_entry_has_the_layout_of_the_kernels_structure() {
        assert_eq!(size_of::<Restriction>(), 16);
        assert_eq!(align_of::<Restriction>(), 4);
        assert_eq!(offset_of!(Restriction, opcode), 0);
        assert_eq!(offset_of!(Restriction, value), 2);
        assert_eq!(offset_of!(Restriction, reserved), 3);
        assert_eq!(offset_of!(Restriction, reserved2), 4);
    }

    #[test]
    fn every_kind_is_read_back_unchanged() {
        for (number, kind) in [
            (0, RestrictionKind::RegisterOperation(RegisterOperation::REGISTER_CLONE_BUFFERS)),
            (1, RestrictionKind::Operation(Operation::WRITE_FIXED)),
            (2, RestrictionKind::FlagsAllowed(SqeFlags::FIXED_FILE | SqeFlags::ASYNC)),
            (3, RestrictionKind::FlagsRequired(SqeFlags::FIXED_FILE)),
        ] {
            let entry = Restriction::new(kind);
            assert_eq!((entry.opcode(), entry.kind()), (number, kind));
        }
    }
}
