//! A ringpass guest without an operating system: what its program and its virtual machine monitor agree on.
//!
//! The program (`src/program/main.rs`) is entered in 64-bit mode at CPL 3 and stays there: it runs at native speed on every
//! KVM, also on nested ones that emulate CPL 0. Only interrupt handlers and the idle call run at CPL 0, a few
//! instructions each. The monitor (`ringpass-vmm`) builds page tables, descriptor tables and the task state.
//!
//! - [`map`]: where everything lies, in guest-physical and guest-virtual addresses.
//! - [`Command`] and [`Answer`]: what the host asks and the guest replies, through a page of words.
//! - [`Histogram`]: latencies, in fixed memory.
//!
//! A vCPU takes a command, does it, writes the answer and *calls*: it writes to [`map::CALL_PORT`], which takes it out
//! of the guest. The first call, before any command, says that it is ready.

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
