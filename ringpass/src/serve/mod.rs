//! `ringpass serve`: a vhost-user-blk back-end. One process serves one disk to one front-end at a time.

mod access;
mod args;
mod control;
mod disk_source;
mod finer_blocks;
mod preflight;
mod rings;
mod sandbox;
mod size;
mod write_chains;

use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use ringpass_broker::disk::{Capabilities, Disk, DiskLease, LocatedDisk};
use ringpass_broker::engine::{Engine, EngineConfig, EngineControl};
use ringpass_broker::limits;
use ringpass_broker::lost_memory::handle_lost_memory;
use ringpass_broker::probe::{self, ModeName};
use ringpass_broker::sandbox::close_descriptors_on_exec;
use ringpass_broker::vhost_user::{ServerHandle, Signals};
use ringpass_broker::virtio_blk::{BlkConfig, BlkParameters, DiscardLimits, WriteZeroesLimits};

use crate::{log, refusal};
pub(crate) use args::ServeArgs;
use disk_source::LeasedDisk;

/// The default log level of a server: it logs connections of front-ends, warnings and errors.
pub(crate) const LOG_LEVEL: &str = "info";

/// The unit of limits in virtio-blk.
const SECTOR_BYTES: u64 = 512;

/// Runs `ringpass serve` until SIGTERM or SIGINT, or until the connection that was passed with `--fd` ends.
///
/// # Errors
///
/// Start-up fails, or the server cannot continue.
pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    if args.print_capabilities() {
        let capabilities = serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] });
        writeln!(std::io::stdout(), "{capabilities}").context("cannot write the capabilities")?;
        return Ok(ExitCode::SUCCESS);
    }
    probe::require_proc()?;
    close_descriptors_on_exec()?;
    // Before other threads start, because they inherit the signal mask.
    let signals = Signals::block().context("cannot block signals")?;
    handle_lost_memory().context("cannot handle SIGBUS")?;
    if let Err(error) = limits::raise_open_files() {
        tracing::warn!(%error, "cannot raise RLIMIT_NOFILE: the server may refuse a front-end with much memory");
    }

    if let Err(error) = limits::raise_memlock() {
        tracing::warn!(%error, "cannot raise RLIMIT_MEMLOCK: the present limit applies to guests' rings");
    }
    // `ringpass probe` does the same, so probe and server never disagree.
    let report = probe::run(&args.probed()).context("cannot probe this machine")?;
    refusal::unless_available(&report, ModeName::Virtqueue)?;

    let located = Arc::new(Disk::locate(&args.disk_config()?)?);
    // The policy is a file of the operator's, which the confined server can no longer read.
    let policy = args.rings().policy()?;
    let device = BlkConfig::new(parameters(args, &located)?)?;
    let offer = args.rings().offer(&located, policy, &report)?;
    preflight::check(args, &located)?;
    disk_source::cap_growth(&located, located.size_bytes())?;

    let name = args.control().name(args.socket_path(), located.path());
    let control_path = args.control().path(&name);
    preflight::check_sockets(args.socket_path(), control_path.as_deref())?;
    // The confined server cannot see which process has locked the disk.
    let start = interruptible(|| located.start_up(args.start_up()).map_err(refusal::advise))?;
    disk_source::bound_growth(&located, args.max_size_bytes())?;
    // Before this process has threads and hides files. The ring process closes at once what it gets of the disk.
    let ring_host = rings::start_host(&offer, &device, &located, args.sandbox())?;
    // Changing the group of a socket needs privileges, which the sandbox drops.
    let access = args.access().decide();
    let socket = args.socket()?.prepare(access.front_end)?;
    let control_socket = args.control().bind(control_path.as_deref(), access.control)?;
    // Before the first ring, because a ring keeps the credentials of its creator.
    let sandbox = args.sandbox().enter(&located, args.socket_path(), control_path.as_deref())?;
    // This is the first additional thread. Privileges are dropped by now, and no later thread has to wait for the log's
    // reader.
    log::write_in_background().context("cannot start the thread that writes the log")?;
    finer_blocks::warn(&located);

    let connections = Arc::new(Connections::default());
    let lease = Arc::new(lease(located.clone(), connections.clone())?);
    let config = EngineConfig::new(device)
        .poll_time(args.poll_time())
        .workers(args.workers())
        .cpus(args.cpus().to_vec())
        .attach(offer.config())
        .ring_host(ring_host);
    let mut engine = Engine::new(config, |control| {
        // Only this call sets the cell.
        let _ = connections.engine.set(control);
        Ok(Box::new(LeasedDisk::new(lease.clone())))
    })?;
    lease.begin(start);

    let server = socket.serve()?;
    let source = control::Source {
        logical_block_bytes: device.logical_block_bytes(),
        name: name.clone(),
        disk: located.clone(),
        mode: args.rings().mode(),
        offer,
        engine: engine.control(),
        started: control::Started::now(),
    };
    let control = control::serve(control_socket, source)?;
    let handle = server.handle();
    // Only this call sets the cell.
    let _ = connections.server.set(handle.clone());
    signals.spawn(handle).context("cannot start the thread for signals")?;
    sandbox.close()?;
    tracing::info!(
        disk = ?located.path(),
        size_bytes = located.size_bytes(),
        read_only = located.is_read_only(),
        direct_io = located.is_direct_io(),
        queues = device.num_queues(),
        queue_size = device.queue_size(),
        "waiting for a front-end"
    );
    // A successor must find no socket in use, even if the last I/O takes long.
    let result = server.run_with(&mut engine, || drop(control));
    engine.shutdown();
    result?;
    Ok(ExitCode::SUCCESS)
}

/// The parts to notify when the lease gets the disk, as soon as they exist.
#[derive(Default)]
struct Connections {
    engine: OnceLock<EngineControl>,
    server: OnceLock<ServerHandle>,
}

/// Creates a lease that passes the disk to the engine, and tells the guest if the size has changed.
fn lease(located: Arc<LocatedDisk>, connections: Arc<Connections>) -> anyhow::Result<DiskLease> {
    DiskLease::new(located.clone(), move |disk| {
        // The previous holder of the disk may have resized it.
        if let Err(error) = disk_source::follow_growth(&located, disk.size_bytes()) {
            tracing::warn!(%error, "cannot set RLIMIT_FSIZE: writes to the end of the disk will fail");
        }
        let has_other_size = connections.engine.get().is_some_and(|engine| engine.set_disk(&disk));
        tracing::info!("disk ready: the server executes requests from now on");
        if let (true, Some(server)) = (has_other_size, connections.server.get()) {
            server.announce_capacity();
        }
    })
    .context("cannot start the thread that waits for the disk's lock")
}

/// Runs `wait` with SIGTERM, SIGINT and SIGQUIT unblocked: they end the process at once. At this point nothing has to
/// be undone.
fn interruptible<T>(wait: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let ending: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT].into_iter().collect();
    ending.thread_unblock().context("cannot unblock signals")?;
    let result = wait();
    ending.thread_block().context("cannot block signals")?;
    result
}

/// The parameters of the device that the guest sees.
fn parameters(args: &ServeArgs, disk: &LocatedDisk) -> anyhow::Result<BlkParameters> {
    let Capabilities { punch_hole, zero_range } = disk.capabilities();
    let discard = punch_hole.map(|limits| DiscardLimits {
        max_sectors: sectors(limits.max_bytes),
        alignment_sectors: sectors(limits.alignment_bytes.into()),
    });
    let write_zeroes = zero_range.map(|zero_range| {
        let max_bytes = [Some(zero_range), punch_hole].into_iter().flatten().map(|limits| limits.max_bytes).min();
        WriteZeroesLimits {
            max_sectors: sectors(max_bytes.unwrap_or(zero_range.max_bytes)),
            may_unmap: punch_hole.is_some(),
        }
    });
    Ok(BlkParameters::new(disk.size_bytes())
        .logical_block_bytes(disk.logical_block_bytes())
        .physical_block_bytes(disk.physical_block_bytes())
        .read_only(disk.is_read_only())
        .num_queues(args.num_queues())
        .queue_size(args.queue_size())
        .serial(args.serial())
        .discard(discard)
        .write_zeroes(write_zeroes))
}

fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR_BYTES).unwrap_or(u32::MAX)
}
