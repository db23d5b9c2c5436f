//! Submission and completion queue entries, with the layout of `<linux/io_uring.h>`.

/// Operations of the default direct policies (`enum io_uring_op`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    /// `IORING_OP_READ_FIXED`: read into a registered buffer.
    ReadFixed = 4,
    /// `IORING_OP_WRITE_FIXED`: write from a registered buffer.
    WriteFixed = 5,
}

/// Bits of `sqe.flags` (`IOSQE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SqeFlags(pub u8);

impl SqeFlags {
    /// `IOSQE_FIXED_FILE`: `sqe.fd` is an index into the registered files.
    pub const FIXED_FILE: Self = Self(1 << 0);
}

/// `RWF_DSYNC` for [`Sqe::rw_flags`]: the write is durable when it completes.
const RWF_DSYNC: u32 = 0x2;

/// A submission queue entry: `struct io_uring_sqe`, 64 bytes, with the field names of fixed reads and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Sqe {
    /// Operation, see [`Opcode`]. Because of the restrictions, any other operation completes with -EACCES.
    pub opcode: u8,
    /// `IOSQE_*`, see [`SqeFlags`].
    pub flags: u8,
    /// Request priority (`IOPRIO_PRIO_VALUE`), 0 for the default.
    pub ioprio: u16,
    /// Fixed file index; the disk is 0.
    pub fd: i32,
    /// Position on the disk, in bytes.
    pub off_bytes: u64,
    /// `iova_base + gpa` of the first byte, see [`FixedAddressing`](crate::FixedAddressing).
    pub addr: u64,
    /// Bytes to transfer.
    pub len_bytes: u32,
    /// `RWF_*`.
    pub rw_flags: u32,
    /// Returned unchanged in the CQE. The kernel does not interpret it.
    pub user_data: u64,
    /// Fixed buffer: `gpa >> slot_shift`.
    pub buf_index: u16,
    /// Registered credentials; always 0 (the kernel answers -EINVAL otherwise).
    pub personality: u16,
    /// `splice_fd_in`, `file_index` and others: 0 for reads and writes. From Linux 6.16 the first byte is
    /// `write_stream` for writes.
    pub file_index: u32,
    /// `addr3`, from Linux 6.14 also `attr_ptr`: 0.
    pub addr3: u64,
    /// `__pad2`, from Linux 6.14 `attr_type_mask`: 0.
    pub pad2: u64,
}

/// The fixed file index of the disk.
const DISK: i32 = 0;

impl Sqe {
    /// Reads `len_bytes` at `off_bytes` of the disk into guest memory at `address`.
    pub fn read_fixed(address: crate::FixedAddress, len_bytes: u32, off_bytes: u64, user_data: u64) -> Self {
        Self {
            opcode: Opcode::ReadFixed as u8,
            flags: SqeFlags::FIXED_FILE.0,
            fd: DISK,
            off_bytes,
            addr: address.addr,
            len_bytes,
            user_data,
            buf_index: address.buf_index,
            ..Self::default()
        }
    }

    /// Writes `len_bytes` of guest memory at `address` to `off_bytes` of the disk.
    pub fn write_fixed(address: crate::FixedAddress, len_bytes: u32, off_bytes: u64, user_data: u64) -> Self {
        Self { opcode: Opcode::WriteFixed as u8, ..Self::read_fixed(address, len_bytes, off_bytes, user_data) }
    }

    /// The same request, but durable when it completes (`RWF_DSYNC`): for a write with force unit access, or any write
    /// while the write cache is off.
    pub fn durable(self) -> Self {
        Self { rw_flags: self.rw_flags | RWF_DSYNC, ..self }
    }

    /// Encodes the entry as eight native-endian words, to be stored with eight volatile writes.
    pub fn to_words(&self) -> [u64; 8] {
        let join = |parts: [&[u8]; 4]| {
            let mut bytes = [0u8; 8];
            let mut at = 0;
            for part in parts {
                bytes[at..at + part.len()].copy_from_slice(part);
                at += part.len();
            }
            u64::from_ne_bytes(bytes)
        };
        [
            join([&[self.opcode], &[self.flags], &self.ioprio.to_ne_bytes(), &self.fd.to_ne_bytes()]),
            self.off_bytes,
            self.addr,
            join([&self.len_bytes.to_ne_bytes(), &self.rw_flags.to_ne_bytes(), &[], &[]]),
            self.user_data,
            join([&self.buf_index.to_ne_bytes(), &self.personality.to_ne_bytes(), &self.file_index.to_ne_bytes(), &[]]),
            self.addr3,
            self.pad2,
        ]
    }
}

/// A completion queue entry: `struct io_uring_cqe`, 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Cqe {
    /// `sqe.user_data` of the request.
    pub user_data: u64,
    /// Bytes transferred, or a negated errno.
    pub res: i32,
    /// `IORING_CQE_F_*`.
    pub flags: u32,
}

impl Cqe {
    /// Decodes an entry from its two native-endian words.
    pub fn from_words(words: [u64; 2]) -> Self {
        let [user_data, result] = words;
        let [r0, r1, r2, r3, f0, f1, f2, f3] = result.to_ne_bytes();
        Self { user_data, res: i32::from_ne_bytes([r0, r1, r2, r3]), flags: u32::from_ne_bytes([f0, f1, f2, f3]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FixedAddress;

    const ADDRESS: FixedAddress = FixedAddress { buf_index: 3, addr: 0x1_c000_1000 };

    #[test]
    fn a_read_sets_the_disk_and_the_buffer_and_no_other_field() {
        let expected = Sqe {
            opcode: 4,
            flags: 1,
            off_bytes: 8192,
            addr: 0x1_c000_1000,
            len_bytes: 4096,
            user_data: 7,
            buf_index: 3,
            ..Sqe::default()
        };
        assert_eq!(Sqe::read_fixed(ADDRESS, 4096, 8192, 7), expected);
    }

    #[test]
    fn a_write_differs_from_a_read_only_in_the_operation() {
        let read = Sqe::read_fixed(ADDRESS, 4096, 8192, 7);
        assert_eq!(Sqe::write_fixed(ADDRESS, 4096, 8192, 7), Sqe { opcode: 5, ..read });
    }

    #[test]
    fn a_durable_request_keeps_its_other_flags() {
        let write = Sqe { rw_flags: 0x8, ..Sqe::write_fixed(ADDRESS, 4096, 8192, 7) };
        assert_eq!(write.durable(), Sqe { rw_flags: 0xa, ..write });
    }
}
