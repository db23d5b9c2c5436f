//! What the kernel's io_uring supports, found out with throw-away rings.

use std::io;

use io_uring::{IoUring, Probe, register::Restriction};
use nix::libc::{EACCES, EINVAL};
use ringpass_restrictions::{
    KernelSupport, LinuxVersion, Operation, OperationSet, RegisterOperation, RegisterOperationSet, RestrictionSemantics,
};

use super::KernelRelease;

/// Asks the running kernel which operations and restrictions a policy can use.
///
/// Operations come from `IORING_REGISTER_PROBE` (Linux 5.6). Most kernels have no such list of register operations, so
/// this tries one-entry restriction tables: the kernel refuses the numbers that it does not know. A table without
/// register operations shows whether the kernel has the semantics of Linux 7.0. This makes and closes a few small
/// rings; the calling process keeps nothing of them. Which operations take provided buffers follows from the kernel's
/// version: that decides only the errno of a refused SQE, never whether the SQE is refused.
///
/// # Errors
///
/// The error of `io_uring_setup(2)` or `io_uring_register(2)`, e.g. `EPERM` where io_uring is forbidden, `EINVAL` where
/// the kernel has no restrictions (before Linux 5.10).
pub fn support() -> io::Result<KernelSupport> {
    let mut support = KernelSupport::upstream(version()?);
    support.operations = operations()?;
    support.register_operations = register_operations()?;
    support.numbered = numbered()?;
    support.semantics = semantics()?;
    Ok(support)
}

fn disabled_ring() -> io::Result<IoUring> {
    IoUring::builder().setup_r_disabled().build(1)
}

fn operations() -> io::Result<OperationSet> {
    let mut probe = Probe::new();
    disabled_ring()?.submitter().register_probe(&mut probe)?;
    Ok((0..=u8::MAX).filter(|&code| probe.is_supported(code)).map(Operation::new).collect())
}

/// The kernel compares the number in a table entry with the last number that it knows (`io_parse_restrictions`), so the
/// highest accepted number gives them all. A refused table leaves the ring as it was.
fn register_operations() -> io::Result<RegisterOperationSet> {
    let ring = disabled_ring()?;
    for last in (0..=u8::MAX).rev() {
        match ring.submitter().register_restrictions(&mut [Restriction::register_op(last)]) {
            Ok(()) => return Ok((0..=last).map(RegisterOperation::new).collect()),
            Err(error) if error.raw_os_error() == Some(EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(EINVAL))
}

/// As for register operations: the kernel compares the number in an entry with the last number that it knows.
fn numbered() -> io::Result<OperationSet> {
    let ring = disabled_ring()?;
    for last in (0..=u8::MAX).rev() {
        match ring.submitter().register_restrictions(&mut [Restriction::sqe_op(last)]) {
            Ok(()) => return Ok((0..=last).map(Operation::new).collect()),
            Err(error) if error.raw_os_error() == Some(EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(EINVAL))
}

fn version() -> io::Result<LinuxVersion> {
    let release = KernelRelease::running().map_err(io::Error::other)?.upstream();
    let part = |number: u16| u8::try_from(number).unwrap_or(u8::MAX);
    Ok(LinuxVersion { major: part(release.major), minor: part(release.minor) })
}

fn semantics() -> io::Result<RestrictionSemantics> {
    let ring = disabled_ring()?;
    let submitter = ring.submitter();
    submitter.register_restrictions(&mut [Restriction::sqe_op(Operation::READ_FIXED.code())])?;
    submitter.register_enable_rings()?;
    match submitter.register_probe(&mut Probe::new()) {
        Ok(()) => Ok(RestrictionSemantics::FromLinux7),
        Err(error) if error.raw_os_error() == Some(EACCES) => Ok(RestrictionSemantics::BeforeLinux7),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::KernelVersion;

    #[test]
    fn the_running_kernel_has_the_operations_of_its_release() {
        let support = support().expect("the broker's tests need io_uring");
        let upstream = KernelRelease::running().unwrap().upstream();
        let has = |since: ringpass_restrictions::LinuxVersion| {
            upstream >= KernelVersion::released(since.major.into(), since.minor.into(), 0)
        };
        // A kernel may have more operations than its number implies, and lack those that it was configured without.
        for operation in [Operation::READ_FIXED, Operation::WRITE_FIXED, Operation::READ, Operation::FUTEX_WAIT] {
            assert!(support.operations.contains(operation) || !has(operation.since().unwrap()), "{operation}");
        }
        for operation in RegisterOperation::named() {
            assert!(support.register_operations.contains(operation) || !has(operation.since().unwrap()), "{operation}");
        }
        assert!(!support.operations.contains(Operation::new(255)));
        assert!(!support.register_operations.contains(RegisterOperation::new(255)));
    }

    #[test]
    fn the_semantics_change_with_linux_7_0() {
        let support = support().expect("the broker's tests need io_uring");
        let release = KernelRelease::running().unwrap();
        let expected = if release.upstream() >= KernelVersion::released(7, 0, 0) {
            RestrictionSemantics::FromLinux7
        } else {
            RestrictionSemantics::BeforeLinux7
        };
        assert!(support.semantics == expected || release.backports_of().is_some(), "{:?}", support.semantics);
    }
}
