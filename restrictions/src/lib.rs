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
//! slots, priorities or read/write flags.
//!
//! ```
//! use ringpass_restrictions::{Access, KernelSupport, Operation, Policy, RegisterOperation, RestrictionSemantics};
//!
//! let kernel = KernelSupport {
//!     operations: (0..=Operation::WRITEV_FIXED.code()).map(Operation::new).collect(),
//!     register_operations: (0..=RegisterOperation::REGISTER_QUERY.code()).map(RegisterOperation::new).collect(),
//!     semantics: RestrictionSemantics::BeforeLinux7,
//! };
//! let policy = Policy::direct(Access::ReadOnly);
//! let table = policy.compile(&kernel)?;
//! assert!(table.operations().contains(Operation::READ_FIXED));
//! assert!(!table.operations().contains(Operation::WRITE_FIXED));
//! # Ok::<(), ringpass_restrictions::CompileError>(())
//! ```

#![forbid(unsafe_code)]

mod compile;
mod operation;
mod policy;
mod set;
mod support;
mod table;

pub use compile::{Class, CompileError, CompiledPolicy};
pub use operation::{LinuxVersion, Operation, RegisterOperation};
pub use policy::{Access, Policy, SqeFlags, TargetSemantics};
pub use set::{OperationSet, RegisterOperationSet};
pub use support::{KernelSupport, RestrictionSemantics};
pub use table::{Restriction, RestrictionKind};
