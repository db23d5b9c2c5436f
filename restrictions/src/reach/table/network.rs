//! Operations on sockets.

use super::{AT_ONCE, EVENT, FILES, NETWORK, READS, UNBOUNDED, WORKER, WRITES, row};
use crate::operation::Operation;
use crate::reach::OperationFacts;

pub(super) const ROWS: &[OperationFacts] = &[
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
        Operation::ACCEPT,
        "accept connections as new descriptors",
        NETWORK.union(FILES).union(WRITES),
        EVENT,
        "io_uring/net.c io_accept_prep, io_accept; accept4(2)",
    )
    .on_file(),
    row(
        Operation::CONNECT,
        "connect sockets to any address",
        NETWORK.union(READS),
        EVENT,
        "io_uring/net.c io_connect_prep (move_addr_to_kernel), io_connect; connect(2)",
    )
    .on_file(),
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
        Operation::SHUTDOWN,
        "shut sockets down",
        NETWORK.union(UNBOUNDED),
        WORKER,
        "io_uring/net.c io_shutdown_prep (REQ_F_FORCE_ASYNC), io_shutdown; shutdown(2)",
    )
    .on_file(),
    row(
        Operation::SOCKET,
        "make sockets, as descriptors or in the table",
        NETWORK.union(FILES),
        AT_ONCE,
        "io_uring/net.c io_socket; socket(2)",
    ),
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
];
