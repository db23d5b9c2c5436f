//! Benchmarks of ringpass. They are in `benches/`; run them with `cargo bench -p ringpass-benches`.
//!
//! - `driver_ring`: the cost of the driver's side of a ring per request, without a device.
//! - `pinning`: the cost of making guest memory valid in SQEs, and of sharing it with further queues.
//! - `virtio_blk_parse`: the cost of parsing a request of the standard device.
//! - `vhost_user_blk`: the standard device beside `qemu-storage-daemon`.
//!
//! `ringpass demo` compares the speed of a guest's I/O with that of a host process.
