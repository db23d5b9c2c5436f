//! The operations of io_uring, by number and by the kernel's name.
//!
//! The numbers are those of `enum io_uring_op` and `enum io_uring_register_op` in `<linux/io_uring.h>`, Linux 7.0. The
//! versions are those of io_uring_enter(2) and io_uring_register(2); if the page gives no version or a wrong one, the
//! first release whose header has the operation.

use core::fmt;

/// The version of a Linux release, without the patch level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinuxVersion {
    /// The 6 of 6.15.
    pub major: u8,
    /// The 15 of 6.15.
    pub minor: u8,
}

impl fmt::Display for LinuxVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Linux {}.{}", self.major, self.minor)
    }
}

/// Defines a newtype over the kernel's number, with a constant and a table row for each operation.
macro_rules! kernel_codes {
    (
        $(#[$type_doc:meta])* $Type:ident named $prefix:literal;
        $( ($major:literal, $minor:literal) { $( $constant:ident = $code:literal, )+ } )+
    ) => {
        $(#[$type_doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $Type(u8);

        impl $Type {
            $($(
                #[doc = concat!("`", $prefix, stringify!($constant), "` (Linux ", $major, ".", $minor, ").")]
                pub const $constant: Self = Self($code);
            )+)+

            /// Every operation that this crate has a name for, with its name and its first release.
            const NAMED: &'static [(Self, &'static str, LinuxVersion)] = &[
                $($( (
                    Self::$constant,
                    concat!($prefix, stringify!($constant)),
                    LinuxVersion { major: $major, minor: $minor },
                ), )+)+
            ];

            /// The operation with this number. This crate or the kernel need not know it.
            #[must_use]
            pub const fn new(code: u8) -> Self {
                Self(code)
            }

            /// The kernel's number.
            #[must_use]
            pub const fn code(self) -> u8 {
                self.0
            }

            /// All operations that this crate has a name for.
            pub fn named() -> impl Iterator<Item = Self> {
                Self::NAMED.iter().map(|&(operation, ..)| operation)
            }

            /// The operation that the kernel's header calls `name`; `None` for a name that this crate does not know.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                Self::NAMED.iter().find(|&&(_, known, _)| known == name).map(|&(operation, ..)| operation)
            }

            /// The kernel's name; `None` for an operation newer than this crate (Linux 7.0).
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                Self::NAMED.iter().find(|&&(known, ..)| known == self).map(|&(_, name, _)| name)
            }

            /// The first release with the operation; `None` for an operation newer than this crate (Linux 7.0).
            #[must_use]
            pub fn since(self) -> Option<LinuxVersion> {
                Self::NAMED.iter().find(|&&(known, ..)| known == self).map(|&(_, _, since)| since)
            }
        }

        impl fmt::Debug for $Type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl From<u8> for $Type {
            fn from(code: u8) -> Self {
                Self(code)
            }
        }

        impl From<$Type> for u8 {
            fn from(operation: $Type) -> Self {
                operation.0
            }
        }
    };
}

kernel_codes! {
    /// An operation that an SQE can request: the opcode of `struct io_uring_sqe`, one of `IORING_OP_*`.
    Operation named "IORING_OP_";
    (5, 1) {
        NOP = 0, READV = 1, WRITEV = 2, FSYNC = 3, READ_FIXED = 4, WRITE_FIXED = 5, POLL_ADD = 6,
        POLL_REMOVE = 7,
    }
    (5, 2) { SYNC_FILE_RANGE = 8, }
    (5, 3) { SENDMSG = 9, RECVMSG = 10, }
    (5, 4) { TIMEOUT = 11, }
    (5, 5) { TIMEOUT_REMOVE = 12, ACCEPT = 13, ASYNC_CANCEL = 14, LINK_TIMEOUT = 15, CONNECT = 16, }
    (5, 6) {
        FALLOCATE = 17, OPENAT = 18, CLOSE = 19, FILES_UPDATE = 20, STATX = 21, READ = 22, WRITE = 23,
        FADVISE = 24, MADVISE = 25, SEND = 26, RECV = 27, OPENAT2 = 28, EPOLL_CTL = 29,
    }
    (5, 7) { SPLICE = 30, PROVIDE_BUFFERS = 31, REMOVE_BUFFERS = 32, }
    (5, 8) { TEE = 33, }
    (5, 11) { SHUTDOWN = 34, RENAMEAT = 35, UNLINKAT = 36, }
    (5, 15) { MKDIRAT = 37, SYMLINKAT = 38, LINKAT = 39, }
    (5, 18) { MSG_RING = 40, }
    (5, 19) { FSETXATTR = 41, SETXATTR = 42, FGETXATTR = 43, GETXATTR = 44, SOCKET = 45, URING_CMD = 46, }
    (6, 0) { SEND_ZC = 47, }
    (6, 1) { SENDMSG_ZC = 48, }
    (6, 7) { READ_MULTISHOT = 49, WAITID = 50, FUTEX_WAIT = 51, FUTEX_WAKE = 52, FUTEX_WAITV = 53, }
    (6, 8) { FIXED_FD_INSTALL = 54, }
    (6, 9) { FTRUNCATE = 55, }
    (6, 11) { BIND = 56, LISTEN = 57, }
    (6, 15) { RECV_ZC = 58, EPOLL_WAIT = 59, READV_FIXED = 60, WRITEV_FIXED = 61, }
    (6, 16) { PIPE = 62, }
    (6, 19) { NOP128 = 63, URING_CMD128 = 64, }
}

kernel_codes! {
    /// An operation of `io_uring_register(2)`: one of `IORING_REGISTER_*` and `IORING_UNREGISTER_*`.
    RegisterOperation named "IORING_";
    (5, 1) { REGISTER_BUFFERS = 0, UNREGISTER_BUFFERS = 1, REGISTER_FILES = 2, UNREGISTER_FILES = 3, }
    (5, 2) { REGISTER_EVENTFD = 4, UNREGISTER_EVENTFD = 5, }
    (5, 5) { REGISTER_FILES_UPDATE = 6, }
    (5, 6) {
        REGISTER_EVENTFD_ASYNC = 7, REGISTER_PROBE = 8, REGISTER_PERSONALITY = 9, UNREGISTER_PERSONALITY = 10,
    }
    (5, 10) { REGISTER_RESTRICTIONS = 11, REGISTER_ENABLE_RINGS = 12, }
    (5, 13) {
        REGISTER_FILES2 = 13, REGISTER_FILES_UPDATE2 = 14, REGISTER_BUFFERS2 = 15, REGISTER_BUFFERS_UPDATE = 16,
    }
    (5, 14) { REGISTER_IOWQ_AFF = 17, UNREGISTER_IOWQ_AFF = 18, }
    (5, 15) { REGISTER_IOWQ_MAX_WORKERS = 19, }
    (5, 18) { REGISTER_RING_FDS = 20, UNREGISTER_RING_FDS = 21, }
    (5, 19) { REGISTER_PBUF_RING = 22, UNREGISTER_PBUF_RING = 23, }
    (6, 0) { REGISTER_SYNC_CANCEL = 24, REGISTER_FILE_ALLOC_RANGE = 25, }
    (6, 8) { REGISTER_PBUF_STATUS = 26, }
    (6, 9) { REGISTER_NAPI = 27, UNREGISTER_NAPI = 28, }
    (6, 12) { REGISTER_CLOCK = 29, REGISTER_CLONE_BUFFERS = 30, }
    (6, 13) { REGISTER_SEND_MSG_RING = 31, }
    (6, 15) { REGISTER_ZCRX_IFQ = 32, }
    (6, 13) { REGISTER_RESIZE_RINGS = 33, REGISTER_MEM_REGION = 34, }
    (6, 18) { REGISTER_QUERY = 35, }
    (6, 19) { REGISTER_ZCRX_CTRL = 36, }
    (7, 0) { REGISTER_BPF_FILTER = 37, }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => write!(f, "IORING_OP {}", self.0),
        }
    }
}

impl fmt::Display for RegisterOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => write!(f, "IORING_REGISTER {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbered_without_gaps_as_in_the_kernels_enums() {
        let operations: Vec<u8> = Operation::named().map(Operation::code).collect();
        assert_eq!(operations, (0..65).collect::<Vec<u8>>());
        let register: Vec<u8> = RegisterOperation::named().map(RegisterOperation::code).collect();
        assert_eq!(register, (0..38).collect::<Vec<u8>>());
    }

    #[test]
    fn every_name_finds_its_operation_again() {
        for operation in Operation::named() {
            assert_eq!(Operation::from_name(&operation.to_string()), Some(operation));
            assert!(operation.to_string().starts_with("IORING_OP_"));
        }
        for operation in RegisterOperation::named() {
            assert_eq!(RegisterOperation::from_name(&operation.to_string()), Some(operation));
        }
        assert_eq!(Operation::from_name("IORING_OP_LAST"), None);
        assert_eq!(RegisterOperation::from_name("IORING_OP_NOP"), None);
    }

    #[test]
    fn an_operation_newer_than_the_table_is_shown_by_number() {
        assert_eq!(Operation::new(200).to_string(), "IORING_OP 200");
        assert_eq!(RegisterOperation::new(200).to_string(), "IORING_REGISTER 200");
        assert_eq!(Operation::new(200).since(), None);
    }

    #[test]
    fn the_release_of_an_operation_is_known() {
        assert_eq!(Operation::READV_FIXED.since().unwrap().to_string(), "Linux 6.15");
        assert_eq!(RegisterOperation::REGISTER_CLONE_BUFFERS.since().unwrap().to_string(), "Linux 6.12");
    }
}
