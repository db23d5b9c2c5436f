//! A small virtual machine monitor on KVM for the bare-metal ringpass guest.
//!
//! The monitor has only what such a guest needs: memory slots, an in-kernel interrupt controller, page and descriptor
//! tables, and a thread for each vCPU. It does not know the broker: the program that combines the two adds memory slots
//! of guest RAM, irqfds, ioeventfds and windows through [`Machine::vm`] (`ringpass_broker::kvm` provides all of them).
//! Other monitors would work in the same way; read [`Machine`] as an example.
//!
//! | type | purpose |
//! | --- | --- |
//! | [`Machine`] | the VM and the program's memory |
//! | [`GuestCpu`] | a vCPU on its thread: takes a [`Command`](ringpass_bare_metal::Command) and returns an [`Outcome`] |
//!
//! # Native speed
//!
//! The program runs at CPL 3 and polls memory. On the data path it never leaves the guest.

mod config;
mod cpu;
mod error;
mod machine;
mod state;
mod tables;

pub use config::MachineConfig;
pub use cpu::{GuestCpu, Outcome};
pub use error::VmmError;
pub use machine::{Machine, PROGRAM_SLOT, create_vm};

/// The program: `ringpass-bare-metal`, built by the build script.
pub(crate) static IMAGE: &[u8] = include_bytes!(env!("RINGPASS_BARE_METAL_IMAGE"));
