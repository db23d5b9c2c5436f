//! Operations on rings and their buffers, and on the owner's memory.

use super::{AT_ONCE, NOTHING, UNBOUNDED, WORKER, WRITES, row};
use crate::operation::Operation;
use crate::reach::{OperationFacts, Reach};

pub(super) const ROWS: &[OperationFacts] = &[
    row(
        Operation::NOP,
        "post completions, with a result of its choice",
        NOTHING,
        AT_ONCE,
        "io_uring/nop.c io_nop; CVE-2026-64426",
    ),
    row(
        Operation::ASYNC_CANCEL,
        "cancel requests of the same ring",
        NOTHING,
        AT_ONCE,
        "io_uring/cancel.c io_async_cancel (the ring's own tasks and requests)",
    ),
    row(
        Operation::MADVISE,
        "discard memory of the owner at any address",
        WRITES.union(UNBOUNDED),
        WORKER,
        "io_uring/advise.c io_madvise_prep (REQ_F_FORCE_ASYNC), io_madvise (do_madvise of current->mm); madvise(2)",
    ),
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
        Operation::MSG_RING,
        "post completions to other rings and put files into their tables",
        Reach::OTHER_RINGS.union(UNBOUNDED),
        AT_ONCE,
        "io_uring/msg_ring.c io_msg_ring_data, io_msg_send_fd; io_uring_prep_msg_ring(3)",
    )
    .on_file(),
    row(Operation::NOP128, "post completions, with a result of its choice", NOTHING, AT_ONCE, "io_uring/nop.c io_nop"),
];
