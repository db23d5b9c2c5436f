//! Restriction policies for io_uring rings with untrusted submitters.
//!
//! io_uring can limit what may be done with a ring: which operations an SQE may ask for, which `IOSQE_*` flags it may
//! and must carry, and which `io_uring_register(2)` operations the ring's owner may still call
//! (`IORING_REGISTER_RESTRICTIONS`, Linux 5.10, before `IORING_REGISTER_ENABLE_RINGS`). This crate holds such a rule
//! set as a value, the [`Policy`], and compiles it for one kernel, described by [`KernelSupport`], to the table the
//! kernel takes, the [`CompiledPolicy`].
//!
//! The kernel's interface has traps, and a policy that would fall into one does not compile:
//!
//! - One opcode that the kernel does not know fails the whole table with `EINVAL`, without a word about which. The
//!   [`CompileError`] names every unknown operation.
//! - Repeated `SQE_FLAGS_*` entries overwrite each other; they do not add up. A compiled policy has exactly one of
//!   each.
//! - From Linux 7.0 a table without any SQE rule leaves all SQEs free, and a table without any register rule leaves
//!   all register operations free; before 7.0 either would have denied everything. A compiled policy always has at
//!   least one operation of each class, so it means the same on both.
//!
//! Restrictions look at the opcode and the flags of an SQE, at nothing else: not at addresses, lengths, offsets, file
//! slots, priorities or read/write flags. A policy can have rules on those, too ([`FieldRules`]); then it is for rings
//! whose SQEs a checker in user space sees before they are executed: the [`Checker`], which says of every SQE what the
//! kernel would, and then what the rules say.
//!
//! What a policy lets its submitter reach is known from a table of all operations ([`Operation::facts`]):
//! [`Policy::lint`] names each way out, [`Policy::describe`] says in words what a guest can do, and [`Policy::differences`]
//! what another policy changes. With the feature `files` policies are read from and written to TOML ([`PolicyFile`]);
//! [`BuiltIn`] are those that ship.
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

#![forbid(unsafe_code)]

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
pub use policy::{Access, Policy, SqeFlags, TargetSemantics};
pub use reach::{OperationFacts, Reach};
pub use set::{OperationSet, RegisterOperationSet};
pub use sqe::Sqe;
pub use support::{KernelSupport, RestrictionSemantics};
pub use table::{Restriction, RestrictionKind};
