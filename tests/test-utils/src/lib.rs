//! The guest's and the front-end's side of a vhost-user block device, for tests.
//!
//! A test is the driver, and often the front-end too. By default the code here keeps the rules. It does one step at a
//! time, so that a test can stop anywhere, look, and write anything beside it.
//!
//! | module | concept |
//! | --- | --- |
//! | [`ram`] | guest RAM: regions of memfds, and arenas that hand it out |
//! | [`event`] | the eventfds of a vring: kick and call |
//! | [`descriptor`] | descriptors, and tables of linked descriptors |
//! | [`vring`] | the driver of one split virtqueue: its layout, its honest steps, and ways to break the rules |
//! | [`blk`] | virtio-blk requests, one at a time |
//! | [`attach`] | the driver of queues that become rings: attach requests, control page, epochs, requests on the ring |
//! | [`front_end`] | the front-end: messages as bytes, messages as methods, and a session as a VMM has it |
//!
//! The unit tests of the broker's engine, the end-to-end tests and the benchmarks use this crate. It does not know the
//! broker.
//!
//! # Drivers that are not here
//!
//! * `ringpass_guest::vhost_user` is the driver that applications use. A test of it must not share its faults.
//! * The models of the fuzz targets (`broker/src/virtqueue/fuzzing`, `broker/src/virtio_blk/fuzzing`) are compiled into
//!   the broker's library for the fuzzers, and write rings and chains cell by cell from arbitrary bytes: a driver that
//!   keeps the rules would take these inputs away.
//! * The unit tests of the broker's `virtqueue` write single cells of rings at fixed addresses, because each of them
//!   tests such a cell.
//! * `broker/tests` and the benchmark `vhost_user_blk` use the front-end of the crate `vhost` and the driver of the
//!   crate `virtio-driver`, because others wrote them.
//! * `ringpass_guest`'s test device is the other side: it takes chains and announces epochs.
//! * The workload's test device executes requests without any queue in memory.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

pub mod attach;
pub mod blk;
pub mod descriptor;
pub mod event;
pub mod front_end;
pub mod ram;
pub mod vring;

/// How long anything may take that does not wait for a slow disk: much longer than it takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds. Tries it every 50 µs.
///
/// # Errors
///
/// The condition fails, or does not hold within [`PATIENCE`].
pub fn wait_until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !condition()? {
        ensure!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}
