//! The end-to-end tests of ringpass, and their common code.
//!
//! The tests themselves are the programs in `tests/`: each registers its tests with [`harness`].

pub mod bare_qemu;
pub mod broker_process;
pub mod content;
pub mod dd;
pub mod debian;
pub mod disk_holder;
pub mod disks;
pub mod forgetful_proxy;
pub mod front_end;
pub mod harness;
pub mod held_proxy;
pub mod hostile_run;
pub mod huge_pages;
pub mod interruption;
pub mod kernel_log;
pub mod kvm_guest;
pub mod linux_guest;
pub mod lying_device;
pub mod mounts;
pub mod needs;
pub mod page_cache;
pub mod pairs;
pub mod policy_kernels;
pub mod process_guest;
pub mod ram_piece;
pub mod raw_guest;
pub mod socket_guest;
pub mod stuck_disk;
pub mod waits;

pub use ringpass_policy_on_kernel::{canaries, differential, restricted_ring, seed, soundness};
