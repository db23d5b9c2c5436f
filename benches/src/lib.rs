//! Benchmarks of ringpass. They are in `benches/`: `cargo bench -p ringpass-benches`.
//!
//! - `driver_ring`: what the driver's side of a ring costs per request, without any device.
//! - `pinning`: what it costs to make guest memory valid in SQEs, and to share it with further queues.
//! - `virtio_blk_parse`: what it costs to understand a request of the standard device.
//! - `vhost_user_blk`: the standard device beside `qemu-storage-daemon`.
//!
//! How fast a guest's I/O is beside a host process's is measured by `ringpass demo`.
