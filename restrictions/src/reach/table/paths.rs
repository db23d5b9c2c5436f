//! Operations that find files by path, and those that make, install or close descriptors.

use super::{AT_ONCE, FILES, READS, UNBOUNDED, WORKER, WRITES, row};
use crate::operation::Operation;
use crate::reach::OperationFacts;

pub(super) const ROWS: &[OperationFacts] = &[
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
        Operation::OPENAT2,
        "open any file that the owner may open",
        FILES.union(READS).union(UNBOUNDED),
        WORKER,
        "io_uring/openclose.c io_openat2_prep (copy_struct_from_user), io_openat2; openat2(2)",
    ),
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
        Operation::SETXATTR,
        "set attributes of any file by path",
        FILES.union(READS).union(UNBOUNDED),
        WORKER,
        "io_uring/xattr.c io_setxattr_prep (getname, REQ_F_FORCE_ASYNC); setxattr(2)",
    ),
    row(
        Operation::GETXATTR,
        "write attributes of any file to memory at any address",
        FILES.union(READS).union(WRITES).union(UNBOUNDED),
        WORKER,
        "io_uring/xattr.c io_getxattr_prep (getname, REQ_F_FORCE_ASYNC); getxattr(2)",
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
        Operation::PIPE,
        "make pipes, and write their descriptors to any address",
        FILES.union(WRITES),
        AT_ONCE,
        "io_uring/openclose.c io_pipe, io_pipe_fd (copy_to_user); pipe2(2)",
    ),
];
