//! The instructions that a Linux guest executes for a read, in the block driver and in the virtio core: the repository's
//! driver on rings beside the kernel's own `virtio_blk`, on the same server.
//!
//! QEMU emulates the guests (also where KVM works) and counts, so the figures do not depend on this machine. What does: how
//! many completions an interrupt announces, and with it the share of an interrupt in a read.
//!
//! `cargo bench -p ringpass-benches --bench guest_instructions -- --help` shows the options. Needs what Linux guests of the
//! tests need: qemu-system-x86, and Debian's kernel and headers, which it downloads.

mod counts;
mod plugin;
mod workload;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use ringpass_benches::build_program;
use ringpass_tests::linux_guest::{
    BlockDriver, KernelSeries, LinuxGuest, LinuxGuestConfig,
    on_rings::{AWAIT_RINGS, ServedDisk},
};

use counts::Row;
use plugin::Plugin;
use workload::{WORKLOADS, Workload};

/// Count the guest's instructions for each read.
#[derive(Debug, Parser)]
struct Args {
    /// Number of reads of each workload.
    #[arg(long, default_value_t = 4000)]
    reads: u32,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
    /// Print what each function takes.
    #[arg(long)]
    functions: bool,
    /// Passed by cargo; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    build_program()?;
    let plugin = Plugin::build()?;
    let mut rows = Vec::new();
    for is_ours in [false, true] {
        rows.extend(count(&plugin, is_ours, args.reads)?);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        counts::print(&rows, args.functions);
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs all workloads in a guest with the repository's driver, or with the kernel's own.
fn count(plugin: &Plugin, is_ours: bool, reads: u32) -> Result<Vec<Row>> {
    let kernel = KernelSeries::Linux6_12;
    let served = ServedDisk::new()?;
    let counter = plugin.counter()?;
    let config = LinuxGuestConfig {
        kernel,
        // One CPU: then a read does not move between CPUs, and nothing waits for a lock.
        cpus: 1,
        block_driver: if is_ours { Some(BlockDriver::of(kernel)?) } else { None },
        disks: vec![served.device()],
        tcg_plugin: Some(counter.option()),
        ..LinuxGuestConfig::default()
    };
    let mut guest = served.broker.explain(LinuxGuest::boot(&config))?;
    if is_ours {
        served.broker.explain(guest.run(AWAIT_RINGS))?;
    }
    let symbols = counts::Symbols::read(&mut guest)?;
    let mut rows = Vec::new();
    for workload in WORKLOADS {
        eprintln!("{}: {workload}", if is_ours { "ringpass_blk" } else { "virtio_blk" });
        rows.push(measure(&mut guest, &counter, &symbols, workload, is_ours, reads)?);
    }
    guest.shut_down()?;
    served.end()?;
    Ok(rows)
}

fn measure(
    guest: &mut LinuxGuest,
    counter: &plugin::Counter,
    symbols: &counts::Symbols,
    workload: &Workload,
    is_ours: bool,
    reads: u32,
) -> Result<Row> {
    // Once before, so that the caches of the kernel's allocators are full.
    guest.run(&workload.script(reads / 8))?;
    let interrupts_before = workload::interrupts(guest)?;
    let before = counter.counts()?;
    guest.run(&workload.script(reads))?;
    let after = counter.counts()?;
    let interrupts = workload::interrupts(guest)? - interrupts_before;
    Ok(Row::new(workload, is_ours, reads, interrupts, symbols.attribute(&before, &after)))
}
