//! Each call that is allowed with some arguments only is tried with others.

use std::os::fd::{AsFd, AsRawFd};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fcntl_getfl, fcntl_setfl, memfd_create};

use super::*;

#[test]
fn a_call_is_refused_with_arguments_that_serving_does_not_use() {
    const NAME: &str = "arguments::a_call_is_refused_with_arguments_that_serving_does_not_use";
    if let Some(output) = child(NAME) {
        return assert_all_refused(&output, 20);
    }
    in_fork(|| {
        let disk = tempfile::tempfile().unwrap();
        let parent = nix::unistd::getppid().as_raw() as u64;
        let own = u64::from(std::process::id());
        let fd = disk.as_raw_fd() as u64;
        let here = libc::AT_FDCWD as u64;
        let restricted = drop_privileges().unwrap().restrict_paths(&paths(&disk)).unwrap();
        restricted.filter_system_calls(Role::Server).unwrap();
        // Credentials, CPUs of workers, NAPI, messages, another size, zero-copy reception.
        for operation in [9, 17, 27, 31, 32, 33] {
            refused("io_uring_register", libc::SYS_io_uring_register, [fd, operation, 8, 1, 0]);
        }
        // Limits of this process and of another.
        refused("prlimit64", libc::SYS_prlimit64, [0, u64::from(libc::RLIMIT_NOFILE), 8, 0, 0]);
        refused("prlimit64", libc::SYS_prlimit64, [own, u64::from(libc::RLIMIT_MEMLOCK), 8, 0, 0]);
        refused("prlimit64", libc::SYS_prlimit64, [parent, u64::from(libc::RLIMIT_FSIZE), 8, 0, 0]);
        refused("prlimit64", libc::SYS_prlimit64, [parent, u64::from(libc::RLIMIT_FSIZE), 0, 8, 0]);
        // CPUs of another process.
        refused("sched_setaffinity", libc::SYS_sched_setaffinity, [parent, 8, 8, 0, 0]);
        // Signals by files, leases, watches of directories, sizes of pipes, POSIX locks.
        for (command, argument) in [
            (libc::F_SETOWN, parent),
            (libc::F_SETFL, libc::O_ASYNC as u64),
            (libc::F_SETLEASE, 0),
            (libc::F_NOTIFY, 1),
            (libc::F_SETPIPE_SZ, 4096),
            (libc::F_SETLK, 8),
            (libc::F_DUPFD, 0),
        ] {
            refused("fcntl", libc::SYS_fcntl, [fd, command as u64, argument, 0, 0]);
        }
        // FIOASYNC, TIOCSTI, FS_IOC_SETFLAGS.
        for request in [0x5452, 0x5412, 0x4008_6602] {
            refused("ioctl", libc::SYS_ioctl, [fd, request, 8, 0, 0]);
        }
        refused("prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0]);
        refused("prctl", libc::SYS_prctl, [libc::PR_SET_PTRACER as u64, parent, 0, 0, 0]);
        // A process, and a thread with namespaces of its own.
        refused("clone", libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0]);
        refused("clone", libc::SYS_clone, [0x003d_0f00 | libc::CLONE_NEWNET as u64, 0, 0, 0, 0]);
        refused("memfd_create", libc::SYS_memfd_create, [8, u64::from(libc::MFD_HUGETLB), 0, 0, 0]);
        refused("mmap", libc::SYS_mmap, [0, 4096, libc::PROT_EXEC as u64, libc::MAP_SHARED as u64, fd]);
        refused("openat", libc::SYS_openat, [here, 8, (libc::O_CREAT | libc::O_WRONLY) as u64, 0o600, 0]);
        refused("openat", libc::SYS_openat, [here, 8, (libc::O_TMPFILE | libc::O_RDWR) as u64, 0o600, 0]);
        refused("unlinkat", libc::SYS_unlinkat, [here, 8, libc::AT_REMOVEDIR as u64, 0, 0]);
        refused("mkdirat", libc::SYS_mkdirat, [here, 8, 0o700, 0, 0]);
        refused("fallocate", libc::SYS_fallocate, [fd, 0, 0, 4096, 0]);
        refused("getsockopt", libc::SYS_getsockopt, [fd, libc::SOL_SOCKET as u64, libc::SO_PEERSEC as u64, 8, 8]);
        refused("setsockopt", libc::SYS_setsockopt, [fd, libc::SOL_SOCKET as u64, libc::SO_SNDBUF as u64, 8, 4]);
        refused("sendto", libc::SYS_sendto, [fd, 8, 1, 0, 8]);
        refused("tgkill", libc::SYS_tgkill, [parent, parent, 0, 0, 0]);
    });
}

#[test]
fn a_call_is_allowed_with_the_arguments_of_serving() {
    const NAME: &str = "arguments::a_call_is_allowed_with_the_arguments_of_serving";
    if let Some(output) = child(NAME) {
        let text = assert_success(&output);
        assert!(!text.contains("the sandbox refused"), "{text}");
        return;
    }
    in_fork(|| {
        let disk = tempfile::tempfile().unwrap();
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let restricted = drop_privileges().unwrap().restrict_paths(&paths(&disk)).unwrap();
        restricted.filter_system_calls(Role::Server).unwrap();
        // The size of the disk changes.
        let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
        setrlimit(Resource::RLIMIT_FSIZE, 1 << 20, hard).unwrap();
        getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        // A worker starts.
        let cpus = rustix::thread::sched_getaffinity(None).unwrap();
        thread::spawn(move || rustix::thread::sched_setaffinity(None, &cpus).unwrap()).join().unwrap();
        // An in-flight region.
        let memory = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
        assert!(fcntl_get_seals(&memory).unwrap().contains(SealFlags::SHRINK));
        memory.try_clone().unwrap();
        // A disk without access times, a doorbell.
        let flags = fcntl_getfl(&disk).unwrap();
        fcntl_setfl(&disk, flags | OFlags::NONBLOCK).unwrap();
        // A front-end.
        socket.set_nonblocking(true).unwrap();
        rustix::net::sockopt::socket_peercred(&socket).unwrap();
        rustix::net::send(&socket, b"answer", rustix::net::SendFlags::NOSIGNAL).unwrap();
        assert!(disk.as_fd().try_clone_to_owned().is_ok());
    });
}
