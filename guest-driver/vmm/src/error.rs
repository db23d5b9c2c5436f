//! What can go wrong with a virtual machine.

use std::time::Duration;

/// Why the virtual machine cannot be had, or does not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// KVM refused something.
    #[error("{what}: {source}")]
    Kvm {
        /// What was being done.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM lacks something that the machine needs.
    #[error("this KVM has no {what}")]
    Missing {
        /// What it lacks.
        what: &'static str,
    },
    /// The configuration cannot be had.
    #[error("{what} is {value}: it must be {must}")]
    Config {
        /// What is out of range.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        must: &'static str,
    },
    /// Guest RAM lies where the program, the windows and the doorbells are.
    #[error("guest RAM at {gpa:#x} ({len_bytes} bytes) overlaps 3 GiB to 4 GiB, where the machine keeps its program")]
    RamInTheWay {
        /// Guest-physical address of the region.
        gpa: u64,
        /// Its length in bytes.
        len_bytes: u64,
    },
    /// Guest RAM lies beyond what the program can map.
    #[error(
        "guest RAM at {gpa:#x} ({len_bytes} bytes) ends beyond {end_gpa_max:#x}, the end of the guest's direct map"
    )]
    RamOutOfReach {
        /// Guest-physical address of the region.
        gpa: u64,
        /// Its length in bytes.
        len_bytes: u64,
        /// Where RAM must end at the latest.
        end_gpa_max: u64,
    },
    /// The page tables for the guest's RAM do not fit.
    #[error(
        "the guest's RAM needs more page tables than the machine has room for: at most about 200 GiB can be mapped"
    )]
    PageTables,
    /// Memory of the machine cannot be had or reached.
    #[error("{what}: {source}")]
    Memory {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The vCPU left the guest for something that this machine does not have.
    #[error("vCPU {cpu} stopped: {exit}")]
    Exit {
        /// Number of the vCPU.
        cpu: u32,
        /// What it did, and where.
        exit: String,
    },
    /// The program cannot do what it was asked.
    #[error("the guest on vCPU {cpu} refuses: {message}")]
    Refused {
        /// Number of the vCPU.
        cpu: u32,
        /// Its reason.
        message: String,
    },
    /// The program has panicked.
    #[error("the guest on vCPU {cpu} panicked: {message}")]
    Panicked {
        /// Number of the vCPU.
        cpu: u32,
        /// Its message.
        message: String,
    },
    /// The program's reply makes no sense.
    #[error("the guest on vCPU {cpu} gave an answer that is none ({kind:#x})")]
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
        /// What it is.
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
        /// How long was waited.
        waited: Duration,
    },
    /// The signal that takes a vCPU out of the guest cannot be received, so a vCPU could not be stopped.
    #[error("a vCPU could not be stopped once it runs, SIGRTMIN cannot be used for it: {source}")]
    Kick {
        /// The system's answer.
        source: std::io::Error,
    },
    /// The thread of a vCPU cannot be started.
    #[error("starting the thread of vCPU {cpu}: {source}")]
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
