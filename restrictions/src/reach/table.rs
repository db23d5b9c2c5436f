//! The table of operations, one row for each.

use super::{Ends, OperationFacts, Reach};
use crate::operation::{LinuxVersion, Operation};

const NOTHING: Reach = Reach::empty();
const READS: Reach = Reach::READS_MEMORY;
const WRITES: Reach = Reach::WRITES_MEMORY;
const FILES: Reach = Reach::OTHER_FILES;
const NETWORK: Reach = Reach::NETWORK;
const UNBOUNDED: Reach = Reach::UNBOUNDED_MEMORY;

const AT_ONCE: Ends = Ends::AtOnce;
const DEVICE: Ends = Ends::WithDevice;
const WORKER: Ends = Ends::WithWorker;
const EVENT: Ends = Ends::WithEvent;

const fn row(
    operation: Operation,
    does: &'static str,
    reach: Reach,
    ends: Ends,
    source: &'static str,
) -> OperationFacts {
    OperationFacts { operation, does, reach, ends, takes_file: false, buffer_select_since: None, source }
}

impl OperationFacts {
    /// The operation works on the file of `fd`.
    const fn on_file(mut self) -> Self {
        self.takes_file = true;
        self
    }

    /// The operation takes provided buffers since this release.
    const fn select(mut self, major: u8, minor: u8) -> Self {
        self.buffer_select_since = Some(LinuxVersion { major, minor });
        self
    }
}

/// The rows, in the order of the operations' numbers.
pub(super) const TABLE: &[OperationFacts] = &[
    row(
        Operation::NOP,
        "post completions, with a result of its choice",
        NOTHING,
        AT_ONCE,
        "io_uring/nop.c io_nop; CVE-2026-64426",
    ),
    row(
        Operation::READV,
        "read files into memory at any address",
        READS.union(WRITES),
        DEVICE,
        "io_uring/rw.c io_prep_readv, io_import_rw_buffer; readv(2)",
    )
    .on_file()
    .select(5, 7),
    row(
        Operation::WRITEV,
        "write memory at any address to files",
        READS,
        DEVICE,
        "io_uring/rw.c io_prep_writev, io_import_rw_buffer; writev(2)",
    )
    .on_file(),
    row(
        Operation::FSYNC,
        "flush files",
        UNBOUNDED,
        WORKER,
        "io_uring/sync.c io_fsync_prep (REQ_F_FORCE_ASYNC: always an io-wq worker); fsync(2)",
    )
    .on_file(),
    row(
        Operation::READ_FIXED,
        "read files into registered buffers",
        NOTHING,
        DEVICE,
        "io_uring/rw.c io_init_rw_fixed, io_uring/rsrc.c io_import_reg_buf (validate_fixed_range)",
    )
    .on_file(),
    row(
        Operation::WRITE_FIXED,
        "write registered buffers to files",
        NOTHING,
        DEVICE,
        "io_uring/rw.c io_init_rw_fixed, io_uring/rsrc.c io_import_reg_buf (validate_fixed_range)",
    )
    .on_file(),
    row(
        Operation::POLL_ADD,
        "wait for files to become ready, for ever",
        UNBOUNDED,
        EVENT,
        "io_uring/poll.c io_poll_add; io_uring_enter(2)",
    )
    .on_file(),
    row(
        Operation::POLL_REMOVE,
        "end or change polls of the same ring",
        NOTHING,
        AT_ONCE,
        "io_uring/poll.c io_poll_remove (looks in ctx->cancel_table)",
    ),
    row(
        Operation::SYNC_FILE_RANGE,
        "flush ranges of files",
        UNBOUNDED,
        WORKER,
        "io_uring/sync.c io_sfr_prep (REQ_F_FORCE_ASYNC); sync_file_range(2)",
    )
    .on_file(),
    row(
        Operation::SENDMSG,
        "send memory at any address",
        NETWORK.union(READS),
        EVENT,
        "io_uring/net.c io_sendmsg_prep, io_sendmsg; sendmsg(2)",
    )
    .on_file(),
    row(
        Operation::RECVMSG,
        "receive into memory at any address",
        NETWORK.union(READS).union(WRITES),
        EVENT,
        "io_uring/net.c io_recvmsg_prep, io_recvmsg; recvmsg(2)",
    )
    .on_file()
    .select(5, 7),
    row(
        Operation::TIMEOUT,
        "start any number of time-outs that never end",
        READS.union(UNBOUNDED),
        EVENT,
        "io_uring/timeout.c __io_timeout_prep (get_timespec64 of addr), io_timeout",
    ),
    row(
        Operation::TIMEOUT_REMOVE,
        "end or change time-outs of the same ring",
        READS,
        AT_ONCE,
        "io_uring/timeout.c io_timeout_remove_prep (get_timespec64 of addr2)",
    ),
    row(
        Operation::ACCEPT,
        "accept connections as new descriptors",
        NETWORK.union(FILES).union(WRITES),
        EVENT,
        "io_uring/net.c io_accept_prep, io_accept; accept4(2)",
    )
    .on_file(),
    row(
        Operation::ASYNC_CANCEL,
        "cancel requests of the same ring",
        NOTHING,
        AT_ONCE,
        "io_uring/cancel.c io_async_cancel (the ring's own tasks and requests)",
    ),
    row(
        Operation::LINK_TIMEOUT,
        "limit the time of linked requests",
        READS,
        AT_ONCE,
        "io_uring/timeout.c __io_timeout_prep (get_timespec64 of addr)",
    ),
    row(
        Operation::CONNECT,
        "connect sockets to any address",
        NETWORK.union(READS),
        EVENT,
        "io_uring/net.c io_connect_prep (move_addr_to_kernel), io_connect; connect(2)",
    )
    .on_file(),
    row(
        Operation::FALLOCATE,
        "allocate, grow and punch files",
        UNBOUNDED.union(Reach::FILE_SIZE),
        WORKER,
        "io_uring/sync.c io_fallocate_prep (REQ_F_FORCE_ASYNC), io_fallocate; fallocate(2)",
    )
    .on_file(),
    row(
        Operation::OPENAT,
        "open any file that the owner may open",
        FILES.union(READS).union(UNBOUNDED),
        WORKER,
        "io_uring/openclose.c __io_openat_prep (getname), io_openat2; openat(2)",
    ),
    row(
        Operation::CLOSE,
        "close descriptors of the owner and slots of the table",
        FILES,
        WORKER,
        "io_uring/openclose.c io_close (file_close_get_locked, io_close_fixed); close(2)",
    ),
    row(
        Operation::FILES_UPDATE,
        "put any descriptor of the owner into the table",
        FILES.union(READS),
        AT_ONCE,
        "io_uring/rsrc.c io_files_update, __io_sqe_files_update (copy_from_user of the descriptors)",
    ),
    row(
        Operation::STATX,
        "read the status of any file by path, and write it to any address",
        FILES.union(READS).union(WRITES).union(UNBOUNDED),
        WORKER,
        "io_uring/statx.c io_statx_prep (REQ_F_FORCE_ASYNC), io_statx; statx(2)",
    ),
    row(
        Operation::READ,
        "read files into memory at any address",
        WRITES,
        DEVICE,
        "io_uring/rw.c io_prep_read, io_import_rw_buffer (import_ubuf); read(2)",
    )
    .on_file()
    .select(5, 7),
    row(
        Operation::WRITE,
        "write memory at any address to files",
        READS,
        DEVICE,
        "io_uring/rw.c io_prep_write, io_import_rw_buffer (import_ubuf); write(2)",
    )
    .on_file(),
    row(
        Operation::FADVISE,
        "advise the page cache, in worker threads",
        UNBOUNDED,
        WORKER,
        "io_uring/advise.c io_fadvise_prep (io_fadvise_force_async); posix_fadvise(2)",
    )
    .on_file(),
    row(
        Operation::MADVISE,
        "discard memory of the owner at any address",
        WRITES.union(UNBOUNDED),
        WORKER,
        "io_uring/advise.c io_madvise_prep (REQ_F_FORCE_ASYNC), io_madvise (do_madvise of current->mm); madvise(2)",
    ),
    row(
        Operation::SEND,
        "send memory at any address",
        NETWORK.union(READS),
        EVENT,
        "io_uring/net.c io_sendmsg_prep, io_send; send(2)",
    )
    .on_file()
    .select(6, 10),
    row(
        Operation::RECV,
        "receive into memory at any address",
        NETWORK.union(WRITES),
        EVENT,
        "io_uring/net.c io_recvmsg_prep, io_recv; recv(2)",
    )
    .on_file()
    .select(5, 7),
    row(
        Operation::OPENAT2,
        "open any file that the owner may open",
        FILES.union(READS).union(UNBOUNDED),
        WORKER,
        "io_uring/openclose.c io_openat2_prep (copy_struct_from_user), io_openat2; openat2(2)",
    ),
    row(
        Operation::EPOLL_CTL,
        "add any descriptor of the owner to an epoll, by number",
        FILES.union(READS),
        AT_ONCE,
        "io_uring/epoll.c io_epoll_ctl_prep (epfd and fd are descriptors, whatever the flags); epoll_ctl(2)",
    ),
    row(
        Operation::SPLICE,
        "move data from any descriptor of the owner to another file",
        FILES.union(UNBOUNDED),
        WORKER,
        "io_uring/splice.c __io_splice_prep (REQ_F_FORCE_ASYNC), io_splice_get_file (splice_fd_in); splice(2)",
    )
    .on_file(),
    row(
        Operation::PROVIDE_BUFFERS,
        "provide addresses of the owner for later reads, stored in kernel memory",
        WRITES.union(UNBOUNDED),
        AT_ONCE,
        "io_uring/kbuf.c io_provide_buffers_prep, io_add_buffers; io_uring_provided_buffers(7)",
    ),
    row(
        Operation::REMOVE_BUFFERS,
        "remove provided buffers",
        NOTHING,
        AT_ONCE,
        "io_uring/kbuf.c io_remove_buffers_prep, io_manage_buffers_legacy",
    ),
    row(
        Operation::TEE,
        "copy data from any pipe of the owner to another",
        FILES.union(UNBOUNDED),
        WORKER,
        "io_uring/splice.c io_tee_prep (REQ_F_FORCE_ASYNC), io_splice_get_file (splice_fd_in); tee(2)",
    )
    .on_file(),
    row(
        Operation::SHUTDOWN,
        "shut sockets down",
        NETWORK.union(UNBOUNDED),
        WORKER,
        "io_uring/net.c io_shutdown_prep (REQ_F_FORCE_ASYNC), io_shutdown; shutdown(2)",
    )
    .on_file(),
    row(
        Operation::RENAMEAT,
        "rename any file by path",
        FILES.union(READS).union(UNBOUNDED),
        WORKER,
        "io_uring/fs.c io_renameat_prep (REQ_F_FORCE_ASYNC); renameat2(2)",
    ),
    row(
        Operation::UNLINKAT,
        "remove any file by path",
        FILES.union(READS).union(UNBOUNDED),
        WORKER,
        "io_uring/fs.c io_unlinkat_prep (REQ_F_FORCE_ASYNC); unlinkat(2)",
    ),
    row(
        Operation::MKDIRAT,
        "make directories by path",
        FILES.union(READS).union(UNBOUNDED),
        WORKER,
        "io_uring/fs.c io_mkdirat_prep (REQ_F_FORCE_ASYNC); mkdirat(2)",
    ),
    row(
        Operation::SYMLINKAT,
        "make symbolic links by path",
        FILES.union(READS).union(UNBOUNDED),
        WORKER,
        "io_uring/fs.c io_symlinkat_prep (REQ_F_FORCE_ASYNC); symlinkat(2)",
    ),
    row(
        Operation::LINKAT,
        "make hard links by path",
        FILES.union(READS).union(UNBOUNDED),
        WORKER,
        "io_uring/fs.c io_linkat_prep (REQ_F_FORCE_ASYNC); linkat(2)",
    ),
    row(
        Operation::MSG_RING,
        "post completions to other rings and put files into their tables",
        Reach::OTHER_RINGS.union(UNBOUNDED),
        AT_ONCE,
        "io_uring/msg_ring.c io_msg_ring_data, io_msg_send_fd; io_uring_prep_msg_ring(3)",
    )
    .on_file(),
    row(
        Operation::FSETXATTR,
        "set attributes of files from memory at any address",
        READS.union(UNBOUNDED),
        WORKER,
        "io_uring/xattr.c __io_setxattr_prep (REQ_F_FORCE_ASYNC); fsetxattr(2)",
    )
    .on_file(),
    row(
        Operation::SETXATTR,
        "set attributes of any file by path",
        FILES.union(READS).union(UNBOUNDED),
        WORKER,
        "io_uring/xattr.c io_setxattr_prep (getname, REQ_F_FORCE_ASYNC); setxattr(2)",
    ),
    row(
        Operation::FGETXATTR,
        "write attributes of files to memory at any address",
        READS.union(WRITES).union(UNBOUNDED),
        WORKER,
        "io_uring/xattr.c __io_getxattr_prep (REQ_F_FORCE_ASYNC); fgetxattr(2)",
    )
    .on_file(),
    row(
        Operation::GETXATTR,
        "write attributes of any file to memory at any address",
        FILES.union(READS).union(WRITES).union(UNBOUNDED),
        WORKER,
        "io_uring/xattr.c io_getxattr_prep (getname, REQ_F_FORCE_ASYNC); getxattr(2)",
    ),
    row(
        Operation::SOCKET,
        "make sockets, as descriptors or in the table",
        NETWORK.union(FILES),
        AT_ONCE,
        "io_uring/net.c io_socket; socket(2)",
    ),
    row(
        Operation::URING_CMD,
        "give drivers and file systems commands: NVMe passthrough, ublk, socket options",
        Reach::DRIVER_COMMANDS.union(READS).union(WRITES),
        EVENT,
        "io_uring/uring_cmd.c io_uring_cmd; drivers/nvme/host/ioctl.c nvme_ns_uring_cmd; io_uring/cmd_net.c",
    )
    .on_file()
    .select(6, 18),
    row(
        Operation::SEND_ZC,
        "send memory at any address",
        NETWORK.union(READS),
        EVENT,
        "io_uring/net.c io_send_zc_prep; io_uring_prep_send_zc(3)",
    )
    .on_file(),
    row(
        Operation::SENDMSG_ZC,
        "send memory at any address",
        NETWORK.union(READS),
        EVENT,
        "io_uring/net.c io_send_zc_prep, io_sendmsg_zc; io_uring_prep_sendmsg_zc(3)",
    )
    .on_file(),
    row(
        Operation::READ_MULTISHOT,
        "read files into provided buffers again and again",
        WRITES.union(UNBOUNDED),
        EVENT,
        "io_uring/rw.c io_read_mshot_prep, io_read_mshot; io_uring_prep_read_multishot(3)",
    )
    .on_file()
    .select(6, 7),
    row(
        Operation::WAITID,
        "wait for children of the owner, and write about them to any address",
        Reach::PROCESSES.union(WRITES).union(UNBOUNDED),
        EVENT,
        "io_uring/waitid.c io_waitid_prep, io_waitid; waitid(2)",
    ),
    row(
        Operation::FUTEX_WAIT,
        "wait on futexes at any address, for ever",
        Reach::PROCESSES.union(READS).union(UNBOUNDED),
        EVENT,
        "io_uring/futex.c io_futex_prep, io_futex_wait; futex(2)",
    ),
    row(
        Operation::FUTEX_WAKE,
        "wake threads that wait on futexes at any address",
        Reach::PROCESSES.union(READS),
        AT_ONCE,
        "io_uring/futex.c io_futex_prep, io_futex_wake; futex(2)",
    ),
    row(
        Operation::FUTEX_WAITV,
        "wait on futexes at any addresses, for ever",
        Reach::PROCESSES.union(READS).union(UNBOUNDED),
        EVENT,
        "io_uring/futex.c io_futexv_prep (futex_parse_waitv), io_futexv_wait; futex(2)",
    ),
    row(
        Operation::FIXED_FD_INSTALL,
        "make descriptors of the owner from slots of the table, in any number",
        FILES,
        AT_ONCE,
        "io_uring/openclose.c io_install_fixed_fd (receive_fd); io_uring_prep_fixed_fd_install(3)",
    )
    .on_file(),
    row(
        Operation::FTRUNCATE,
        "change the size of files",
        Reach::FILE_SIZE.union(UNBOUNDED),
        WORKER,
        "io_uring/truncate.c io_ftruncate_prep (REQ_F_FORCE_ASYNC); ftruncate(2)",
    )
    .on_file(),
    row(
        Operation::BIND,
        "bind sockets to any address",
        NETWORK.union(READS),
        AT_ONCE,
        "io_uring/net.c io_bind_prep (move_addr_to_kernel), io_bind; bind(2)",
    )
    .on_file(),
    row(Operation::LISTEN, "listen on sockets", NETWORK, AT_ONCE, "io_uring/net.c io_listen; listen(2)").on_file(),
    row(
        Operation::RECV_ZC,
        "receive into memory areas of the owner's network queues",
        NETWORK.union(UNBOUNDED),
        EVENT,
        "io_uring/net.c io_recvzc_prep, io_recvzc; Documentation/networking/iou-zcrx.rst",
    )
    .on_file(),
    row(
        Operation::EPOLL_WAIT,
        "wait for an epoll, and write events to any address",
        WRITES.union(UNBOUNDED),
        EVENT,
        "io_uring/epoll.c io_epoll_wait_prep, io_epoll_wait (epoll_sendevents); epoll_wait(2)",
    )
    .on_file(),
    row(
        Operation::READV_FIXED,
        "read files into registered buffers, by a list at any address",
        READS,
        DEVICE,
        "io_uring/rw.c io_rw_prep_reg_vec, io_uring/rsrc.c io_prep_reg_iovec (iovec_from_user)",
    )
    .on_file(),
    row(
        Operation::WRITEV_FIXED,
        "write registered buffers to files, by a list at any address",
        READS,
        DEVICE,
        "io_uring/rw.c io_rw_prep_reg_vec, io_uring/rsrc.c io_prep_reg_iovec (iovec_from_user)",
    )
    .on_file(),
    row(
        Operation::PIPE,
        "make pipes, and write their descriptors to any address",
        FILES.union(WRITES),
        AT_ONCE,
        "io_uring/openclose.c io_pipe, io_pipe_fd (copy_to_user); pipe2(2)",
    ),
    row(Operation::NOP128, "post completions, with a result of its choice", NOTHING, AT_ONCE, "io_uring/nop.c io_nop"),
    row(
        Operation::URING_CMD128,
        "give drivers and file systems commands: NVMe passthrough, ublk, socket options",
        Reach::DRIVER_COMMANDS.union(READS).union(WRITES),
        EVENT,
        "io_uring/uring_cmd.c io_uring_cmd; drivers/nvme/host/ioctl.c nvme_ns_uring_cmd",
    )
    .on_file()
    .select(6, 19),
];
