//! Operations that wait for something: files, time, processes, futexes.

use super::{AT_ONCE, EVENT, FILES, NOTHING, READS, UNBOUNDED, WRITES, row};
use crate::operation::Operation;
use crate::reach::{OperationFacts, Reach};

pub(super) const ROWS: &[OperationFacts] = &[
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
        Operation::LINK_TIMEOUT,
        "limit the time of linked requests",
        READS,
        AT_ONCE,
        "io_uring/timeout.c __io_timeout_prep (get_timespec64 of addr)",
    ),
    row(
        Operation::EPOLL_CTL,
        "add any descriptor of the owner to an epoll, by number",
        FILES.union(READS),
        AT_ONCE,
        "io_uring/epoll.c io_epoll_ctl_prep (epfd and fd are descriptors, whatever the flags); epoll_ctl(2)",
    ),
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
        Operation::EPOLL_WAIT,
        "wait for an epoll, and write events to any address",
        WRITES.union(UNBOUNDED),
        EVENT,
        "io_uring/epoll.c io_epoll_wait_prep, io_epoll_wait (epoll_sendevents); epoll_wait(2)",
    )
    .on_file(),
];
