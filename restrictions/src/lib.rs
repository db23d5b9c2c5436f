//! Restriction policies for io_uring rings with untrusted submitters.
//!
//! io_uring can restrict a ring: which operations an SQE may request, which `IOSQE_*` flags it may and must carry, and
//! which `io_uring_register(2)` operations the ring's owner may still call (`IORING_REGISTER_RESTRICTIONS`, Linux 5.10,
//! before `IORING_REGISTER_ENABLE_RINGS`). This crate represents such a rule set as a value, the [`Policy`], and
//! compiles it for one kernel, described by [`KernelSupport`], into the table that the kernel accepts, the
//! [`CompiledPolicy`].
//!
//! The kernel's interface has traps. A policy that would fall into a trap does not compile:
//!
//! - If the table has one opcode that the kernel does not know, the kernel refuses the whole table with `EINVAL` and
//!   does not tell which opcode is unknown. The [`CompileError`] names every unknown operation.
//! - Repeated `SQE_FLAGS_*` entries overwrite each other; they do not add up. A compiled policy has exactly one entry
//!   of each kind.
//! - From Linux 7.0 a table without any SQE rule leaves all SQEs unrestricted, and a table without any register rule
//!   leaves all register operations unrestricted; before 7.0 either table denies everything. A compiled policy always
//!   has at least one operation of each class, so it means the same on both kinds of kernels.
//!
//! The kernel's restrictions cover only the opcode and the flags of an SQE. They do not cover addresses, lengths,
//! offsets, file slots, priorities or read/write flags. A policy can have rules on these fields, too ([`FieldRules`]).
//! Such a policy is for rings whose SQEs a checker in user space sees before they are executed: the [`Checker`] first
//! decides as the kernel would, and then applies the rules on fields.
//!
//! A table of all operations ([`Operation::facts`]) states what each operation can reach. [`Policy::lint`] reports each
//! way in which a guest could escape or exhaust the host, [`Policy::describe`] describes in words what a guest can do, and
//! [`Policy::differences`] compares two policies. With the feature `files` the crate reads and writes policies as TOML
//! ([`PolicyFile`]). [`BuiltIn`] lists the policies that the crate ships.
//!
//! # Compile a policy for a kernel
//!
//! ```
//! use ringpass_restrictions::{Access, KernelSupport, LinuxVersion, Operation, Policy};
//!
//! let kernel = KernelSupport::upstream(LinuxVersion { major: 6, minor: 18 });
//! let policy = Policy::direct(Access::ReadOnly);
//! let table = policy.compile(&kernel)?;
//! assert!(table.operations().contains(Operation::READ_FIXED));
//! assert!(!table.operations().contains(Operation::WRITE_FIXED));
//! # Ok::<(), ringpass_restrictions::CompileError>(())
//! ```
//!
//! # Check SQEs
//!
//! ```
//! use ringpass_restrictions::{Access, KernelSupport, LinuxVersion, OffsetWindow, Policy, Sqe, Verdict};
//!
//! // The guest may use the first mebibyte of the file in slot 0.
//! let window = OffsetWindow { start_bytes: 0, len_bytes: 1 << 20 };
//! let policy = Policy::mediated(Access::ReadWrite).with_offset_window(window);
//! let checker = policy.checker(&KernelSupport::upstream(LinuxVersion { major: 6, minor: 18 }));
//!
//! // IORING_OP_READ_FIXED with IOSQE_FIXED_FILE. A checker gets SQEs as the 64 bytes in the guest's ring: copy them once,
//! // check the copy, and submit the copy.
//! let sqe = Sqe { opcode: 4, flags: 1, off: 1 << 20, len: 4096, ..Sqe::default() };
//! match checker.check(&Sqe::from_words(sqe.to_words())) {
//!     Verdict::Allowed => panic!("the read begins behind the window"),
//!     Verdict::Refused(reason) => {
//!         assert_eq!(reason.to_string(), "fields.offset_window does not allow it");
//!         assert_eq!(reason.errno(), 22);
//!     }
//! }
//! ```

#![forbid(unsafe_code)]

mod accept;
mod builtin;
mod check;
mod compile;
mod describe;
mod diff;
mod fields;
#[cfg(feature = "files")]
mod file;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod lint;
mod operation;
mod policy;
mod reach;
mod set;
mod sqe;
mod support;
mod table;

pub use accept::Accepted;
pub use builtin::BuiltIn;
pub use check::{Checker, KernelRules, Refusal, RingMemory, Verdict};
pub use compile::{Class, CompileError, CompiledPolicy};
pub use diff::Difference;
pub use fields::{
    Attributes, FieldFault, FieldRule, FieldRules, IoPrioClasses, LengthRange, OffsetWindow, RwFlags, Slots,
};
#[cfg(feature = "files")]
pub use file::{FileError, PolicyFile};
pub use lint::{Finding, Lint, LintContext, Mode, NopHole, Severity};
pub use operation::{LinuxVersion, Operation, RegisterOperation};
pub use policy::{Access, Policy, TargetSemantics};
pub use reach::{Ends, OperationFacts, Reach};
pub use set::{OperationSet, RegisterOperationSet};
pub use sqe::{Sqe, SqeFlags};
pub use support::{KernelSupport, RestrictionSemantics};
pub use table::{Restriction, RestrictionKind};
