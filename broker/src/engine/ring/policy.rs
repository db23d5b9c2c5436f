//! What the io_uring of a worker may do: what a worker does with it, and nothing else.
//!
//! A worker parses what a guest and a front-end send. If an attacker takes this process over, the sandbox limits its system calls, but
//! seccomp sees nothing of what a ring does: an unrestricted ring could open files and sockets. So the kernel restricts the ring from the
//! first entry on, and no registration lifts the restrictions.

use std::io;

use io_uring::{IoUring, register};
use nix::libc;
use ringpass_restrictions::{
    CompiledPolicy, Operation, Policy, RegisterOperation, Restriction, RestrictionKind, SqeFlags,
};

use crate::kernel;
use crate::limits::while_memory_is_freed;

/// The restrictions of workers' rings.
#[derive(Clone, Debug)]
pub(in crate::engine) struct RingPolicy(Option<CompiledPolicy>);

impl RingPolicy {
    /// The restrictions for the running kernel. There are none before Linux 5.10: rings then stay as they are.
    pub(in crate::engine) fn of_this_kernel() -> Self {
        const OLD_KERNEL: &str = "this kernel does not restrict workers' io_urings";
        let support = while_memory_is_freed(kernel::support, |error| error.raw_os_error() == Some(libc::ENOMEM));
        Self(match support {
            Ok(kernel) => {
                uses_of_workers().compile(&kernel).inspect_err(|error| tracing::debug!(%error, "{OLD_KERNEL}")).ok()
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::debug!(%error, "{OLD_KERNEL}");
                None
            }
            Err(error) => {
                tracing::warn!(%error, "workers' io_urings not restricted: the kernel does not tell what it restricts");
                None
            }
        })
    }

    /// No restrictions, as on an old kernel.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Whether the rings must be made disabled.
    pub(super) fn restricts(&self) -> bool {
        self.0.is_some()
    }

    /// Restricts a disabled ring and enables it. From then on only the calling thread may use the ring
    /// (`IORING_SETUP_SINGLE_ISSUER`).
    pub(super) fn enable(&self, ring: &IoUring) -> io::Result<()> {
        let Some(compiled) = &self.0 else { return Ok(()) };
        let mut table: Vec<_> = compiled.entries().iter().map(entry).collect();
        ring.submitter().register_restrictions(&mut table)?;
        ring.submitter().register_enable_rings()
    }
}

/// The lint of policies is not for this one: its rings are not in a guest's memory.
fn uses_of_workers() -> Policy {
    let operations = [
        // The trial of a new ring.
        Operation::NOP,
        // Requests.
        Operation::READ,
        Operation::WRITE,
        Operation::READV,
        Operation::WRITEV,
        Operation::FSYNC,
        Operation::FALLOCATE,
        // Kicks and commands.
        Operation::POLL_ADD,
        Operation::POLL_REMOVE,
        // The timer.
        Operation::TIMEOUT,
        Operation::TIMEOUT_REMOVE,
    ];
    let policy = operations.into_iter().fold(Policy::new(), Policy::allow);
    // The disk is a fixed file, the eventfds are not.
    let policy = policy.with_flags_allowed(SqeFlags::FIXED_FILE);
    // The disk comes and goes.
    let policy = policy
        .allow_register(RegisterOperation::REGISTER_FILES)
        .allow_register(RegisterOperation::UNREGISTER_FILES)
        .allow_register_if_known(RegisterOperation::REGISTER_FILES2);
    // An index in place of the descriptor, for a ring that the caller has anyway.
    policy.allow_register_if_known(RegisterOperation::REGISTER_RING_FDS)
}

/// An entry as the crate `io-uring` takes it.
fn entry(restriction: &Restriction) -> register::Restriction {
    match restriction.kind() {
        RestrictionKind::RegisterOperation(operation) => register::Restriction::register_op(operation.code()),
        RestrictionKind::Operation(operation) => register::Restriction::sqe_op(operation.code()),
        RestrictionKind::FlagsAllowed(flags) => register::Restriction::sqe_flags_allowed(flags.bits()),
        RestrictionKind::FlagsRequired(flags) => register::Restriction::sqe_flags_required(flags.bits()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};

    use io_uring::{Probe, opcode, squeue, types};
    use vmm_sys_util::eventfd::EventFd;

    use super::super::{DISK, PAGE_CACHE, Ring, open};
    use super::*;

    /// What the kernel answers to an entry.
    fn answer(ring: &mut Ring<'_>, entry: &squeue::Entry) -> i32 {
        // SAFETY: the callers' entries name memory that lives until the completion, which this function waits for.
        unsafe { ring.push(entry) };
        loop {
            // The start of a kernel thread for the entry interrupts the wait.
            ring.submit_and_wait();
            ring.sync_completions();
            if let Some(completion) = ring.reap() {
                return completion.result();
            }
        }
    }

    fn refused(result: io::Result<()>, what: &str) {
        let errno = result.err().and_then(|error| error.raw_os_error());
        assert_eq!(errno, Some(libc::EACCES), "{what}");
    }

    #[test]
    fn a_ring_refuses_operations_that_no_worker_requests() {
        let numbered = kernel::support().unwrap().numbered;
        let mut ring = open(8, &RingPolicy::of_this_kernel()).unwrap();
        let mut ring = Ring::new(&mut ring).unwrap();
        let event = EventFd::new(0).unwrap();
        let fd = types::Fd(event.as_raw_fd());
        let (name, address) = (c"/dev/null".as_ptr(), std::ptr::null());
        let entries = [
            (Operation::OPENAT, opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), name).build()),
            (Operation::SOCKET, opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build()),
            (Operation::CONNECT, opcode::Connect::new(fd, address, 0).build()),
            (Operation::SETXATTR, opcode::SetXattr::new(name, name.cast(), name, 1).build()),
            (Operation::UNLINKAT, opcode::UnlinkAt::new(types::Fd(libc::AT_FDCWD), name).build()),
            (Operation::FTRUNCATE, opcode::Ftruncate::new(fd, 1).build()),
            (Operation::MSG_RING, opcode::MsgRingData::new(fd, 0, 0, None).build()),
            (Operation::READ_FIXED, opcode::ReadFixed::new(fd, std::ptr::null_mut(), 8, 0).build()),
            (Operation::CLOSE, opcode::Close::new(fd).build()),
            // With other flags, the operations of a worker are refused as well.
            (Operation::NOP, opcode::Nop::new().build().flags(squeue::Flags::ASYNC)),
            (Operation::NOP, opcode::Nop::new().build().flags(squeue::Flags::IO_LINK)),
        ];
        for (operation, entry) in entries.into_iter().filter(|(operation, _)| numbered.contains(*operation)) {
            assert_eq!(answer(&mut ring, &entry), -libc::EACCES, "{operation}");
        }
        event.write(1).expect("the eventfd is still open");
    }

    #[test]
    fn a_ring_refuses_registrations_that_no_worker_makes() {
        let policy = RingPolicy::of_this_kernel();
        let ring = open(8, &policy).unwrap();
        let submitter = ring.submitter();
        let event = EventFd::new(0).unwrap();
        refused(submitter.register_eventfd(event.as_raw_fd()), "an eventfd");
        refused(submitter.register_personality().map(drop), "credentials");
        refused(submitter.register_buffers_sparse(1), "buffers");
        refused(submitter.register_iowq_max_workers(&mut [64, 64]), "kernel threads");
        refused(submitter.register_probe(&mut Probe::new()), "a probe");
        refused(policy.enable(&ring), "other restrictions");
    }

    #[test]
    fn a_ring_takes_all_that_a_worker_does() {
        for policy in [RingPolicy::of_this_kernel(), RingPolicy::none()] {
            let mut ring = open(8, &policy).unwrap();
            let mut ring = Ring::new(&mut ring).unwrap();
            let disk = tempfile::tempfile().unwrap();
            ring.register_disk(disk.as_fd(), Some(disk.as_fd())).unwrap();
            let event = EventFd::new(0).unwrap();
            let fd = types::Fd(event.as_raw_fd());
            let mut bytes = *b"twelve bytes";
            let iovec = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
            let (address, len_bytes) = (bytes.as_mut_ptr(), bytes.len() as u32);
            let soon = types::Timespec::new().nsec(1);
            let entries = [
                (opcode::Nop::new().build(), 0),
                (opcode::Fallocate::new(DISK, 4096).build(), 0),
                (opcode::Write::new(DISK, address, len_bytes).build(), 12),
                (opcode::Writev::new(PAGE_CACHE, &raw const iovec, 1).offset(12).build(), 12),
                (opcode::Read::new(DISK, address, len_bytes).build(), 12),
                (opcode::Readv::new(DISK, &raw const iovec, 1).offset(12).build(), 12),
                (opcode::Fsync::new(DISK).flags(types::FsyncFlags::DATASYNC).build(), 0),
                (opcode::PollAdd::new(fd, libc::POLLOUT as u32).build(), i32::from(libc::POLLOUT)),
                (opcode::PollRemove::new(77).build(), -libc::ENOENT),
                (opcode::Timeout::new(&raw const soon).build(), -libc::ETIME),
                (opcode::TimeoutRemove::new(77).build(), -libc::ENOENT),
            ];
            for (number, (entry, expected)) in entries.into_iter().enumerate() {
                assert_eq!(answer(&mut ring, &entry), expected, "entry {number}, {policy:?}");
            }
            ring.unregister_disk().unwrap();
        }
    }

    #[test]
    fn a_ring_without_restrictions_refuses_nothing() {
        let mut ring = open(8, &RingPolicy::none()).unwrap();
        let mut ring = Ring::new(&mut ring).unwrap();
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/nowhere".as_ptr()).build();
        assert_eq!(answer(&mut ring, &open), -libc::ENOENT);
    }
}
