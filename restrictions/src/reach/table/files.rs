//! Operations on an open file: its data, its size, its attributes, its driver.

use super::{DEVICE, EVENT, FILES, NOTHING, READS, UNBOUNDED, WORKER, WRITES, row};
use crate::operation::Operation;
use crate::reach::{OperationFacts, Reach};

pub(super) const ROWS: &[OperationFacts] = &[
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
        Operation::SYNC_FILE_RANGE,
        "flush ranges of files",
        UNBOUNDED,
        WORKER,
        "io_uring/sync.c io_sfr_prep (REQ_F_FORCE_ASYNC); sync_file_range(2)",
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
        Operation::SPLICE,
        "move data from any descriptor of the owner to another file",
        FILES.union(UNBOUNDED),
        WORKER,
        "io_uring/splice.c __io_splice_prep (REQ_F_FORCE_ASYNC), io_splice_get_file (splice_fd_in); splice(2)",
    )
    .on_file(),
    row(
        Operation::TEE,
        "copy data from any pipe of the owner to another",
        FILES.union(UNBOUNDED),
        WORKER,
        "io_uring/splice.c io_tee_prep (REQ_F_FORCE_ASYNC), io_splice_get_file (splice_fd_in); tee(2)",
    )
    .on_file(),
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
        Operation::READ_MULTISHOT,
        "read files into provided buffers again and again",
        WRITES.union(UNBOUNDED),
        EVENT,
        "io_uring/rw.c io_read_mshot_prep, io_read_mshot; io_uring_prep_read_multishot(3)",
    )
    .on_file()
    .select(6, 7),
    row(
        Operation::FSETXATTR,
        "set attributes of files from memory at any address",
        READS.union(UNBOUNDED),
        WORKER,
        "io_uring/xattr.c __io_setxattr_prep (REQ_F_FORCE_ASYNC); fsetxattr(2)",
    )
    .on_file(),
    row(
        Operation::FGETXATTR,
        "write attributes of files to memory at any address",
        READS.union(WRITES).union(UNBOUNDED),
        WORKER,
        "io_uring/xattr.c __io_getxattr_prep (REQ_F_FORCE_ASYNC); fgetxattr(2)",
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
        Operation::URING_CMD128,
        "give drivers and file systems commands: NVMe passthrough, ublk, socket options",
        Reach::DRIVER_COMMANDS.union(READS).union(WRITES),
        EVENT,
        "io_uring/uring_cmd.c io_uring_cmd; drivers/nvme/host/ioctl.c nvme_ns_uring_cmd",
    )
    .on_file()
    .select(6, 19),
];
