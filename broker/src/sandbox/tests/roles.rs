//! Each role is tried: what it does works, and what other roles do is refused.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, opcode};
use ringpass_restrictions::{Access, CompiledPolicy, Policy};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::*;
use crate::direct::{DirectConfig, DirectDevice, QueueConfig, QueuePlacement, SubmissionConfig};
use crate::disk::{DirectIo, Disk, DiskConfig};
use crate::kernel;
use crate::limits::Memlock;
use crate::memory::{GuestMemory, RegionConfig, Sharing};
use crate::ring::{RingConfig, SqThreadConfig, token_directory};
use crate::ring_fd::register_tagged_files;

const REGISTERED_RING: u64 = 1 << 31;
const RAM_BYTES: u64 = 2 << 20;

/// Tries operations of `io_uring_register(2)`, on a file that is no ring.
fn registrations_are_refused(operations: &[u64]) {
    for &operation in operations {
        refused("io_uring_register", libc::SYS_io_uring_register, [0, operation, 8, 1, 0]);
    }
}

#[test]
fn a_server_makes_no_ring_and_changes_its_own_by_the_disk_only() {
    const NAME: &str = "roles::a_server_makes_no_ring_and_changes_its_own_by_the_disk_only";
    if let Some(output) = child(NAME) {
        return assert_all_refused(&output, 25);
    }
    in_fork(|| {
        let disk = tempfile::tempfile().unwrap();
        let restricted = drop_privileges().unwrap().restrict_paths(&paths(&disk)).unwrap();
        // A worker has started.
        let mut ring = IoUring::new(8).unwrap();
        let fd = ring.as_raw_fd();
        // SAFETY: the ring is open until the end of the test.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let (mut submitter, mut sq, mut cq) = ring.split();
        submitter.register_ring_fd().unwrap();
        restricted.filter_system_calls(Role::Server).unwrap();

        refused("io_uring_setup", libc::SYS_io_uring_setup, [8, 8, 0, 0, 0]);
        // Of guests' rings, and of the start of a worker.
        registrations_are_refused(&[0, 1, 4, 5, 11, 12, 15, 16, 19, 20, 21, 30]);
        registrations_are_refused(&[11, 12, 13, 16, 19].map(|operation| operation | REGISTERED_RING));
        // Updates of fixed files, a probe, credentials, rings of buffers, messages.
        registrations_are_refused(&[6, 8, 9, 14, 22, 31]);
        refused("epoll_create1", libc::SYS_epoll_create1, [0; 5]);

        // The disk comes, is used and goes, in each way that kernels know.
        for is_tagged in [false, true] {
            if is_tagged {
                register_tagged_files(fd, [(disk.as_fd(), 1)]).unwrap();
            } else {
                submitter.register_files(&[disk.as_raw_fd()]).unwrap();
            }
            // SAFETY: the entry names no memory.
            unsafe { sq.push(&opcode::Nop::new().build().user_data(7)) }.unwrap();
            sq.sync();
            submitter.submit_and_wait(1).unwrap();
            submitter.unregister_files().unwrap();
            cq.sync();
            assert_eq!(cq.next().map(|completion| (completion.user_data(), completion.result())), Some((7, 0)));
            // A tag may follow.
            cq.by_ref().for_each(drop);
        }
        // The tests of arguments try the rest of what a server does.
    });
}

/// The disk and the memory of a guest, and what its rings may do.
struct Guest {
    disk: Arc<Disk>,
    ram: [Arc<File>; 2],
    policy: CompiledPolicy,
    sharing: Sharing,
}

impl Guest {
    fn new() -> Self {
        // The sandbox does not let the test remove it later.
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let disk = Disk::open(&DiskConfig::new(image.path()).direct_io(DirectIo::Off)).unwrap();
        let ram = [(); 2].map(|()| {
            let file = memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, RAM_BYTES).unwrap();
            Arc::new(File::from(file))
        });
        let support = kernel::support().unwrap();
        let policy = Policy::direct(Access::ReadWrite).compile(&support).unwrap();
        Self { disk: Arc::new(disk), ram, policy, sharing: Sharing::for_kernel(&support) }
    }

    /// Pins memory, makes a ring, counts its requests, gives it another eventfd and other memory, and waits for its end.
    fn has_a_ring(&self, submission: SubmissionConfig) {
        let [low, high] = [0, 1].map(|number| RegionConfig {
            gpa: number << 32,
            len_bytes: RAM_BYTES,
            file: self.ram[number as usize].clone(),
            file_offset_bytes: 0,
        });
        let memory = GuestMemory::new([low.clone()]).unwrap();
        let config = DirectConfig::new(submission, self.sharing);
        let device = DirectDevice::new(self.disk.clone(), &memory, self.policy.clone(), config).unwrap();
        let eventfd = || EventFd::new(EFD_CLOEXEC).unwrap();
        let place = QueuePlacement::GuestRam { rings_gpa: 0, sqes_gpa: RAM_BYTES / 2 };
        let doorbell = eventfd();
        let config = QueueConfig::new(RingConfig { sq_entries: 8, cq_entries: 16 }, place)
            .doorbell(doorbell.try_clone().unwrap())
            .completion(eventfd());
        let queue = device.attach(config).unwrap();
        doorbell.write(1).unwrap();
        queue.gauge().unwrap().read().unwrap();
        queue.replace_completion(Some(&eventfd())).unwrap();
        if self.sharing == Sharing::Clone {
            device.plug(high).unwrap();
            device.set_memory([low]).unwrap();
        }
        queue.close().wait(Duration::from_secs(60)).unwrap();
    }
}

/// Sends a file to the other end of a pair of sockets, and takes it there.
fn pass(file: BorrowedFd<'_>, sockets: &(OwnedFd, OwnedFd)) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file];
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    sendmsg(&sockets.0, &[IoSlice::new(b"memory")], &mut control, SendFlags::NOSIGNAL).unwrap();
    poll(&mut [PollFd::new(&sockets.1, PollFlags::IN)], None).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 16];
    recvmsg(&sockets.1, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let messages = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    messages.flatten().next().unwrap()
}

#[test]
fn a_ring_process_makes_a_guest_s_rings_and_does_nothing_else() {
    const NAME: &str = "roles::a_ring_process_makes_a_guest_s_rings_and_does_nothing_else";
    if let Some(output) = child(NAME) {
        assert_all_refused(&output, 50);
        let text = assert_success(&output);
        assert!(text.contains("the sandbox refused the system call socket (EPERM) in the ring process."), "{text}");
        return;
    }
    in_fork(|| {
        let guest = Guest::new();
        let sockets = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let token = token_directory().unwrap();
        let restricted = drop_privileges().unwrap().restrict_paths(&Paths::none().token_directory(token)).unwrap();
        restricted.filter_system_calls(Role::RingProcess).unwrap();

        let received = pass(guest.ram[0].as_fd(), &sockets);
        assert_eq!(fstat(&received).unwrap().st_size as u64, RAM_BYTES);
        guest.has_a_ring(SubmissionConfig::Doorbell);
        guest.has_a_ring(SubmissionConfig::SqThread(SqThreadConfig::default()));
        // For a refusal, and for the guard of rings.
        Memlock::current().unwrap();
        fs::read_to_string("/proc/meminfo").unwrap();
        thread::spawn(|| eprintln!("a line of the log")).join().unwrap();

        let (here, fd) = (libc::AT_FDCWD as u64, guest.disk.as_fd().as_raw_fd() as u64);
        // Of the rings of workers.
        registrations_are_refused(&[3, 13, 20, 21, REGISTERED_RING | 2, REGISTERED_RING | 3, REGISTERED_RING | 19]);
        // Updates of fixed files, a probe, credentials, CPUs, rings of buffers, messages.
        registrations_are_refused(&[0, 6, 8, 9, 14, 17, 22, 31]);
        // Files are not written, made or removed, neither the disk nor others.
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_CREAT] {
            refused("openat", libc::SYS_openat, [here, 8, flags as u64, 0o600, 0]);
        }
        for (name, number) in [
            ("preadv", libc::SYS_preadv),
            ("preadv2", libc::SYS_preadv2),
            ("pwrite64", libc::SYS_pwrite64),
            ("pwritev", libc::SYS_pwritev),
            ("pwritev2", libc::SYS_pwritev2),
            ("fallocate", libc::SYS_fallocate),
            ("fsync", libc::SYS_fsync),
            ("fdatasync", libc::SYS_fdatasync),
            ("flock", libc::SYS_flock),
            ("ioctl", libc::SYS_ioctl),
        ] {
            refused(name, number, [fd, 0x5421, 0, 0, 0]);
        }
        for (name, number) in [
            ("unlinkat", libc::SYS_unlinkat),
            ("mkdirat", libc::SYS_mkdirat),
            ("renameat2", libc::SYS_renameat2),
            ("faccessat", libc::SYS_faccessat),
            ("execve", libc::SYS_execve),
        ] {
            refused(name, number, [here, 8, 0, 0, 0]);
        }
        // The two processes talk over sockets that are there.
        let socket = sockets.0.as_raw_fd() as u64;
        refused("socket", libc::SYS_socket, [libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0, 0, 0]);
        for (name, number) in [
            ("socketpair", libc::SYS_socketpair),
            ("connect", libc::SYS_connect),
            ("bind", libc::SYS_bind),
            ("listen", libc::SYS_listen),
            ("accept", libc::SYS_accept),
            ("accept4", libc::SYS_accept4),
            ("sendto", libc::SYS_sendto),
            ("recvfrom", libc::SYS_recvfrom),
            ("sendmmsg", libc::SYS_sendmmsg),
            ("getsockopt", libc::SYS_getsockopt),
            ("setsockopt", libc::SYS_setsockopt),
            ("getpeername", libc::SYS_getpeername),
        ] {
            refused(name, number, [socket, 0, 0, 0, 0]);
        }
        // Processes and memory.
        refused("clone", libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0]);
        refused("sched_setaffinity", libc::SYS_sched_setaffinity, [0, 8, 8, 0, 0]);
        refused("prlimit64", libc::SYS_prlimit64, [0, u64::from(libc::RLIMIT_MEMLOCK), 8, 0, 0]);
        refused("mmap", libc::SYS_mmap, [0, 4096, libc::PROT_EXEC as u64, libc::MAP_SHARED as u64, fd]);
        // Landlock.
        for path in [concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"), "/sys/kernel/uevent_seqnum", "/etc/passwd"] {
            assert_eq!(File::open(path).unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{path:?}");
        }
    });
}
