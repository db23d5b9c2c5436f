//! The report, as a table with bars and as JSON.

use std::{fmt, fs};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::client::{Measurement, Operation};

/// All rows, and the parameters of the measurement.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    kernel: String,
    cpu: String,
    rounds: usize,
    millis: u64,
    rows: Vec<Row>,
}

/// One operation at one depth through both servers: medians over the rounds.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    operation: String,
    depth: u16,
    ringpass: Medians,
    qemu_storage_daemon: Medians,
    qemu_storage_daemon_configuration: String,
    /// Median over the rounds of the ratio within one round.
    iops_ratio: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Medians {
    iops: f64,
    p50_ns: u64,
    p99_ns: u64,
}

impl Medians {
    fn of(measurements: &[Measurement]) -> Self {
        Self {
            iops: median(measurements.iter().map(|one| one.iops)),
            p50_ns: median(measurements.iter().map(|one| one.p50_ns as f64)) as u64,
            p99_ns: median(measurements.iter().map(|one| one.p99_ns as f64)) as u64,
        }
    }
}

impl Row {
    /// `ours[i]` and `theirs[i]` must be from the same round.
    pub(crate) fn new(
        operation: Operation,
        depth: u16,
        ours: &[Measurement],
        theirs: &[Measurement],
        configuration: String,
    ) -> Self {
        Self {
            operation: operation.to_string(),
            depth,
            ringpass: Medians::of(ours),
            qemu_storage_daemon: Medians::of(theirs),
            qemu_storage_daemon_configuration: configuration,
            iops_ratio: median(ours.iter().zip(theirs).map(|(ours, theirs)| ours.iops / theirs.iops)),
        }
    }

    fn holds(&self, ratio: f64) -> bool {
        self.iops_ratio >= ratio && self.ringpass.p99_ns <= self.qemu_storage_daemon.p99_ns
    }
}

impl Report {
    pub(crate) fn new(rows: Vec<Row>, rounds: usize, millis: u64) -> Result<Self> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's release")?;
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("cannot read the processor's name")?;
        let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let cpu = cpu.map_or("unknown", |(_, name)| name).to_owned();
        Ok(Self { kernel: kernel.trim().to_owned(), cpu, rounds, millis, rows })
    }

    /// Whether each row has at least this ratio of IOPS and no worse p99.
    pub(crate) fn holds(&self, ratio: f64) -> bool {
        self.rows.iter().all(|row| row.holds(ratio))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "kernel {}, {}, file in the page cache, client and server on one core each",
            self.kernel, self.cpu
        )?;
        writeln!(f, "{} alternating rounds of {} ms, medians; 4 KiB\n", self.rounds, self.millis)?;
        writeln!(
            f,
            "{:10} {:>5}  {:20} {:>9} {:>9} {:>9}  {:>6}",
            "operation", "depth", "server", "IOPS", "p50", "p99", "ratio"
        )?;
        let most =
            self.rows.iter().flat_map(|row| [row.ringpass.iops, row.qemu_storage_daemon.iops]).fold(1.0, f64::max);
        for row in &self.rows {
            let servers = [("ringpass", row.ringpass), ("qemu-storage-daemon", row.qemu_storage_daemon)];
            for (server, medians) in servers {
                let ratio = if server == "ringpass" { format!("{:.2}x", row.iops_ratio) } else { String::new() };
                let bar = "█".repeat((medians.iops / most * 30.0).round() as usize);
                writeln!(
                    f,
                    "{:10} {:>5}  {server:20} {:>9.0} {:>6.2} us {:>6.2} us  {ratio:>6}  {bar}",
                    row.operation,
                    row.depth,
                    medians.iops,
                    medians.p50_ns as f64 / 1e3,
                    medians.p99_ns as f64 / 1e3,
                )?;
            }
        }
        writeln!(f, "\nqemu-storage-daemon's best configuration, found before the rounds:")?;
        for row in &self.rows {
            writeln!(f, "  {:10} {:>5}  {}", row.operation, row.depth, row.qemu_storage_daemon_configuration)?;
        }
        Ok(())
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values = values.collect::<Vec<_>>();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}
