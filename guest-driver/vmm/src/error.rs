//! Errors of a virtual machine.

use std::time::Duration;

/// The reason why a virtual machine cannot be created, or has stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// A call of KVM failed.
    #[error("{what} failed: {source}")]
    Kvm {
        /// The operation that failed.
        what: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// KVM lacks a feature that the machine needs.
    #[error("this KVM has no {what}")]
    Missing {
        /// The missing feature.
        what: &'static str,
    },
    /// The configuration is not possible.
    #[error("{what} is {value}: it must be {must}")]
    Config {
        /// The setting that is out of range.
        what: &'static str,
        /// The value of the setting.
        value: u64,
        /// The permitted values.
        must: &'static str,
    },
    /// Guest RAM overlaps the program, the windows and the doorbells.
    #[error("guest RAM at {gpa:#x} ({len_bytes} bytes) overlaps 3 GiB to 4 GiB, where the machine keeps its program")]
    RamInTheWay {
        /// Guest-physical address of the region.
        gpa: u64,
        /// Length of the region in bytes.
        len_bytes: u64,
    },
    /// Guest RAM exceeds what the program can map.
    #[error(
        "guest RAM at {gpa:#x} ({len_bytes} bytes) ends beyond {end_gpa_max:#x}, the end of the guest's direct map"
    )]
    RamOutOfReach {
        /// Guest-physical address of the region.
        gpa: u64,
        /// Length of the region in bytes.
        len_bytes: u64,
        /// The highest possible end of RAM.
        end_gpa_max: u64,
    },
    /// The page tables for the guest's RAM do not fit.
    #[error(
        "the guest's RAM needs more page tables than the machine has room for: at most about 200 GiB can be mapped"
    )]
    PageTables,
    /// Memory of the machine cannot be allocated or accessed.
    #[error("{what} failed: {source}")]
    Memory {
        /// The operation that failed.
        what: &'static str,
        /// The reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The vCPU left the guest for a reason that this machine does not handle.
    #[error("vCPU {cpu} stopped: {exit}")]
    Exit {
        /// Number of the vCPU.
        cpu: u32,
        /// The reason, and the registers of the vCPU.
        exit: String,
    },
    /// The program cannot execute the command.
    #[error("the guest on vCPU {cpu} refuses: {message}")]
    Refused {
        /// Number of the vCPU.
        cpu: u32,
        /// The program's reason.
        message: String,
    },
    /// The program has panicked.
    #[error("the guest on vCPU {cpu} panicked: {message}")]
    Panicked {
        /// Number of the vCPU.
        cpu: u32,
        /// The panic message.
        message: String,
    },
    /// The program's answer is invalid.
    #[error("the guest on vCPU {cpu} gave an invalid answer ({kind:#x})")]
    BadAnswer {
        /// Number of the vCPU.
        cpu: u32,
        /// The first word of the answer.
        kind: u64,
    },
    /// The vCPU is busy with an earlier command, or has none to wait for.
    #[error("vCPU {cpu} is {state}")]
    Busy {
        /// Number of the vCPU.
        cpu: u32,
        /// The state of the vCPU.
        state: &'static str,
    },
    /// The vCPU's thread has ended.
    #[error("vCPU {cpu} has been stopped")]
    Stopped {
        /// Number of the vCPU.
        cpu: u32,
    },
    /// The command is not done yet.
    #[error("vCPU {cpu} is still at work after {} ms", .waited.as_millis())]
    NotYet {
        /// Number of the vCPU.
        cpu: u32,
        /// How long the caller has waited.
        waited: Duration,
    },
    /// The process cannot receive the signal that takes a vCPU out of the guest, so a running vCPU could not be
    /// stopped.
    #[error("cannot use SIGRTMIN, without which a running vCPU could not be stopped: {source}")]
    Kick {
        /// The system's answer.
        source: std::io::Error,
    },
    /// The thread of a vCPU cannot be started.
    #[error("cannot start the thread of vCPU {cpu}: {source}")]
    Thread {
        /// Number of the vCPU.
        cpu: u32,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl VmmError {
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    pub(crate) fn memory<E: std::error::Error + Send + Sync + 'static>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Memory { what, source: Box::new(source) }
    }
}
