//! Benchmarks of ringpass. They are in `benches/`; run them with `cargo bench -p ringpass-benches`.
//!
//! - `driver_ring`: the cost of the driver's side of a ring per request, without a device.
//! - `fragmented`: a read of several pieces of memory, as several SQEs on a ring and as one request on a virtqueue.
//! - `guest_instructions`: what a read costs a Linux guest, with the repository's driver and with `virtio_blk`.
//! - `pinning`: the cost of making guest memory valid in SQEs, and of sharing it with further queues.
//! - `virtio_blk_parse`: the cost of parsing a request of the standard device.
//! - `vhost_user_blk`: the standard device beside `qemu-storage-daemon`.
//!
//! `ringpass demo` compares the speed of a guest's I/O with that of a host process.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Builds something of this repository in the profile that users run, and returns its path in the target directory. For
/// benchmarks that start it: cargo does not build the programs of other packages with them.
///
/// # Errors
///
/// It does not build, or the benchmark was not started by `cargo bench`.
pub fn build(arguments: &[&str], variables: &[(&str, &str)], file_name: &str) -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--release"]).args(arguments);
    build.args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml")]);
    let status = build.envs(variables.iter().copied()).status().context("cannot start cargo")?;
    ensure!(status.success(), "{file_name} does not build");
    // The benchmark is TARGET/release/deps/NAME.
    let me = env::current_exe()?;
    let path = me.ancestors().nth(2).context("this benchmark has no target directory")?.join(file_name);
    ensure!(path.exists(), "{path:?} does not exist: run the benchmark through `cargo bench`");
    Ok(path)
}

/// Builds the program `ringpass`, and returns its path.
///
/// # Errors
///
/// As for [`build`].
pub fn build_program() -> Result<PathBuf> {
    build(&["--package", "ringpass", "--bin", "ringpass"], &[], "ringpass")
}
