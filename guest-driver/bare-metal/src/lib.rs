//! A ringpass guest without an operating system: the interface between its program and its virtual machine monitor.
//!
//! The monitor enters the program (`src/program/main.rs`) in 64-bit mode at CPL 3, and the program stays there. So it
//! runs at native speed on every KVM, even on nested KVMs that emulate CPL 0. Only the interrupt handlers and the idle
//! call run at CPL 0, a few instructions each. The monitor (`ringpass-vmm`) builds page tables, descriptor tables and
//! the task state.
//!
//! - [`map`]: the guest-physical and guest-virtual addresses of all parts.
//! - [`Command`] and [`Answer`]: the host's commands and the guest's answers, exchanged through a page of words.
//! - [`Histogram`]: latencies in fixed memory.
//!
//! A vCPU takes a command, executes it, writes the answer and *calls*: it writes to [`map::CALL_PORT`], which takes the
//! vCPU out of the guest. The first call, before any command, signals that the vCPU is ready.

#![no_std]
#![forbid(unsafe_code)]

mod answer;
mod command;
mod histogram;
pub mod map;
mod words;

pub use answer::{Answer, MESSAGE_BYTES};
pub use command::{
    ATTACK_EXTENTS_MAX, Attachment, Attack, Bell, Command, HOST_ADDRESSES_MAX, MalformedCommand, RAM_REGIONS_MAX,
    RamRegion, Table, TickRate,
};
pub use histogram::{BUCKETS, Histogram};
pub use words::{MAILBOX_WORDS, Words};
