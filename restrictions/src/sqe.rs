//! The submission queue entry that the checker reads, and its flags.

use core::fmt;

use bitflags::bitflags;

/// The 64 bytes of `struct io_uring_sqe`, with the field names of reads and writes.
///
/// The value is a plain copy. If a guest can still write to an entry, copy the entry once, check the copy, and use the
/// copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sqe {
    /// `IORING_OP_*`.
    pub opcode: u8,
    /// `IOSQE_*`.
    pub flags: u8,
    /// Priority, with the class in bits 13 to 15 (ioprio_set(2)); for network operations, their own flags.
    pub ioprio: u16,
    /// File descriptor, or slot of the file table with `IOSQE_FIXED_FILE`.
    pub fd: i32,
    /// Offset in the file in bytes; all ones for the file's own position.
    pub off: u64,
    /// Address of the data.
    pub addr: u64,
    /// Length of the data in bytes, or the number of vectors.
    pub len: u32,
    /// `RWF_*`, or the flags of another operation.
    pub rw_flags: u32,
    /// Returned unchanged in the CQE. The kernel does not interpret it.
    pub user_data: u64,
    /// Slot of the fixed buffer, or the group of provided buffers.
    pub buf_index: u16,
    /// Registered credentials; 0 for the ring's own credentials.
    pub personality: u16,
    /// `splice_fd_in`, `file_index`, or `write_stream` in the first byte.
    pub file_index: u32,
    /// `addr3`, or `attr_ptr` if `attr_type_mask` is not 0.
    pub addr3: u64,
    /// `IORING_RW_ATTR_FLAG_*`: which attributes `addr3` points to (Linux 6.14).
    pub attr_type_mask: u64,
}

impl Sqe {
    /// Decodes an entry from its eight native-endian words.
    #[inline]
    #[must_use]
    pub const fn from_words(words: [u64; 8]) -> Self {
        let [head, off, addr, length, user_data, slots, addr3, attr_type_mask] = words;
        let head = head.to_ne_bytes();
        let length = length.to_ne_bytes();
        let slots = slots.to_ne_bytes();
        Self {
            opcode: head[0],
            flags: head[1],
            ioprio: u16::from_ne_bytes([head[2], head[3]]),
            fd: i32::from_ne_bytes([head[4], head[5], head[6], head[7]]),
            off,
            addr,
            len: u32::from_ne_bytes([length[0], length[1], length[2], length[3]]),
            rw_flags: u32::from_ne_bytes([length[4], length[5], length[6], length[7]]),
            user_data,
            buf_index: u16::from_ne_bytes([slots[0], slots[1]]),
            personality: u16::from_ne_bytes([slots[2], slots[3]]),
            file_index: u32::from_ne_bytes([slots[4], slots[5], slots[6], slots[7]]),
            addr3,
            attr_type_mask,
        }
    }

    /// Encodes the entry as eight native-endian words.
    #[inline]
    #[must_use]
    pub const fn to_words(&self) -> [u64; 8] {
        let [i0, i1] = self.ioprio.to_ne_bytes();
        let [f0, f1, f2, f3] = self.fd.to_ne_bytes();
        let [l0, l1, l2, l3] = self.len.to_ne_bytes();
        let [r0, r1, r2, r3] = self.rw_flags.to_ne_bytes();
        let [b0, b1] = self.buf_index.to_ne_bytes();
        let [p0, p1] = self.personality.to_ne_bytes();
        let [x0, x1, x2, x3] = self.file_index.to_ne_bytes();
        [
            u64::from_ne_bytes([self.opcode, self.flags, i0, i1, f0, f1, f2, f3]),
            self.off,
            self.addr,
            u64::from_ne_bytes([l0, l1, l2, l3, r0, r1, r2, r3]),
            self.user_data,
            u64::from_ne_bytes([b0, b1, p0, p1, x0, x1, x2, x3]),
            self.addr3,
            self.attr_type_mask,
        ]
    }
}

bitflags! {
    /// The `IOSQE_*` flags of an SQE (io_uring_enter(2)).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct SqeFlags: u8 {
        /// `IOSQE_FIXED_FILE`: `fd` is a slot of the ring's file table.
        const FIXED_FILE = 1 << 0;
        /// `IOSQE_IO_DRAIN`: the request starts only after all earlier requests have ended.
        const IO_DRAIN = 1 << 1;
        /// `IOSQE_IO_LINK`: the next SQE starts after this one, if this one succeeds.
        const IO_LINK = 1 << 2;
        /// `IOSQE_IO_HARDLINK`: the next SQE starts after this one, regardless of the result.
        const IO_HARDLINK = 1 << 3;
        /// `IOSQE_ASYNC`: the request goes to an io-wq worker at once.
        const ASYNC = 1 << 4;
        /// `IOSQE_BUFFER_SELECT`: the kernel chooses a provided buffer.
        const BUFFER_SELECT = 1 << 5;
        /// `IOSQE_CQE_SKIP_SUCCESS`: the request posts no CQE if it succeeds (Linux 5.17).
        const CQE_SKIP_SUCCESS = 1 << 6;
    }
}

/// The kernel's names with " + " between them; "none" for no flag; undefined bits in hex.
impl fmt::Display for SqeFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let mut separator = "";
        for (name, _) in self.iter_names() {
            write!(f, "{separator}IOSQE_{name}")?;
            separator = " + ";
        }
        let undefined = self.bits() & !Self::all().bits();
        if undefined != 0 {
            write!(f, "{separator}undefined {undefined:#04x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_field_has_its_offset_in_the_kernels_structure() {
        let bytes: [u8; 64] = core::array::from_fn(|index| index as u8);
        let words =
            core::array::from_fn(|word| u64::from_ne_bytes(core::array::from_fn(|byte| bytes[8 * word + byte])));
        let at = |offset: usize| offset as u8;
        let u16_at = |offset: usize| u16::from_ne_bytes([at(offset), at(offset + 1)]);
        let u32_at = |offset: usize| u32::from_ne_bytes(core::array::from_fn(|byte| at(offset + byte)));
        let u64_at = |offset: usize| u64::from_ne_bytes(core::array::from_fn(|byte| at(offset + byte)));
        let expected = Sqe {
            opcode: 0,
            flags: 1,
            ioprio: u16_at(2),
            fd: u32_at(4) as i32,
            off: u64_at(8),
            addr: u64_at(16),
            len: u32_at(24),
            rw_flags: u32_at(28),
            user_data: u64_at(32),
            buf_index: u16_at(40),
            personality: u16_at(42),
            file_index: u32_at(44),
            addr3: u64_at(48),
            attr_type_mask: u64_at(56),
        };
        assert_eq!(Sqe::from_words(words), expected);
    }

    proptest! {
        #[test]
        fn decoding_and_encoding_preserve_the_words(words in any::<[u64; 8]>()) {
            prop_assert_eq!(Sqe::from_words(words).to_words(), words);
        }
    }
}
