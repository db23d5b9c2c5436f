//! The verifying workload that every ringpass guest can run: a process, a bare-metal virtual machine, and the host
//! itself as the reference.
//!
//! - [`Job`]: what to do, as plain data. [`prefill`], [`run()`] and [`verify_all`] do it and return a [`Report`].
//! - [`BlockQueue`] (of `ringpass_guest_abi`): where requests go. [`RingQueue`] is a ring of the host's io_uring in guest memory.
//! - [`Environment`]: what the workload needs from the kind of guest it runs in: a clock, interrupts, memory.
//!   With the feature `process`, `ProcessEnv` is that of a process that is its own guest (`ringpass_guest`).
//! - [`hostile`]: everything a guest must not be able to do with its ring, as a script with the expected answers.
//!
//! Without the feature `process` the crate needs neither `std` nor an allocator. A run takes about [`STACK_BYTES`] of stack.
//!
//! # What is verified
//!
//! The caller keeps one `u64` per block, the *expected* table: [`checksum`] of the block's content, or 0 while it is
//! unknown. A write fills its buffer with content that no earlier write of the block had, and its checksum becomes
//! the expectation when the write has succeeded. A read's buffer is spoiled in every 512-byte sector before the
//! request, so that data which never arrived cannot pass for data that did, and its checksum is compared afterwards.
//! No two requests touch one block at the same time.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "process")]
extern crate std;

mod content;
mod engine;
mod environment;
pub mod hostile;
mod job;
#[cfg(feature = "process")]
mod process;
mod report;
mod run;
mod slots;

pub use content::checksum;
pub use environment::{Environment, Wakeup};
pub use job::{DEPTH_MAX, Job, JobError, Verify, Wait};
#[cfg(feature = "process")]
pub use process::{EnvError, ProcessEnv};
pub use report::Report;
pub use ringpass_guest_abi::block_queue::{BlockQueue, Completion, PushRefusal, Request, RingQueue};
pub use run::{STACK_BYTES, prefill, run, verify_all};
