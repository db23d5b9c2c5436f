//! A small virtual machine monitor on KVM for the bare-metal ringpass guest.
//!
//! It has what such a guest needs and nothing else: memory slots, an in-kernel interrupt controller, page and descriptor
//! tables, a thread per vCPU. It knows nothing of the broker: memory slots of guest RAM, irqfds, ioeventfds and windows
//! are added through [`Machine::vm`] by whoever puts the two together (`ringpass_broker::kvm` has all of them). That is
//! also how other monitors would do it; read [`Machine`] as an example.
//!
//! | part | what |
//! | --- | --- |
//! | [`Machine`] | the VM and the program's memory |
//! | [`GuestCpu`] | a vCPU on its thread: takes a [`Command`](ringpass_bare_metal::Command), gives an [`Outcome`] |
//!
//! # Native speed
//!
//! The program runs at CPL 3 and polls memory. Nothing that it does on the data path leaves the guest.

mod cpu;
mod error;
mod machine;
mod state;
mod tables;

pub use cpu::{GuestCpu, Outcome};
pub use error::VmmError;
pub use machine::{Machine, MachineConfig, PROGRAM_SLOT};

/// The program: `ringpass-bare-metal`, built by the build script.
pub(crate) static IMAGE: &[u8] = include_bytes!(env!("RINGPASS_BARE_METAL_IMAGE"));
