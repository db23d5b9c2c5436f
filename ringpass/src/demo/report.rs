//! The demo's report, as a table and as JSON.

use std::fmt::Write as _;

use ringpass_broker::printable::printable;
use serde::Serialize;

/// The results of a demo run.
#[derive(Debug, Serialize)]
pub(crate) struct DemoReport {
    /// Release of the running kernel.
    pub(crate) kernel: String,
    /// The disk.
    pub(crate) disk: DiskReport,
    /// One row per way and depth.
    pub(crate) ways: Vec<Row>,
    /// Ways that could not run here.
    pub(crate) skipped: Vec<Skipped>,
}

/// The demo's disk.
#[derive(Debug, Serialize)]
pub(crate) struct DiskReport {
    /// The path or a description of the disk.
    pub(crate) name: String,
    /// The size of the disk.
    pub(crate) size_bytes: u64,
    /// Whether the page cache is bypassed.
    pub(crate) direct_io: bool,
}

/// One way at one depth.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// `host`, `process`, …
    pub(crate) name: &'static str,
    /// Requests in flight.
    pub(crate) depth: u32,
    /// Reads per second.
    pub(crate) iops: f64,
    /// Median latency.
    pub(crate) p50_ns: u64,
    /// 99th percentile.
    pub(crate) p99_ns: u64,
    /// 99.9th percentile.
    pub(crate) p999_ns: u64,
    /// Median over the rounds of: the way's p50 divided by the host's p50 in the same round.
    pub(crate) ratio_to_host: f64,
    /// VM exits per request, including those for interrupts of the host; `None` if the way has no VM.
    pub(crate) exits_per_io: Option<f64>,
    /// VM exits per request for port I/O, MMIO and hypercalls, as far as this KVM counts them by kind.
    pub(crate) requested_exits_per_io: Option<f64>,
    /// Bytes read and compared.
    pub(crate) verified_bytes: u64,
    /// Number of requests that failed, were lost or were completed twice, and of blocks with wrong content.
    pub(crate) errors: u64,
}

/// A way that could not run.
#[derive(Debug, Serialize)]
pub(crate) struct Skipped {
    /// The name of the way.
    pub(crate) name: &'static str,
    /// Why the way could not run, and what to do.
    pub(crate) why: String,
}

impl DemoReport {
    /// Whether at least one guest ran, and every byte of every way was right.
    pub(crate) fn is_success(&self) -> bool {
        self.has_guest() && self.ways.iter().all(|row| row.errors == 0 && row.verified_bytes > 0)
    }

    fn has_guest(&self) -> bool {
        self.ways.iter().any(|row| row.name != "host")
    }

    fn verdict(&self) -> &'static str {
        match (self.is_success(), self.has_guest()) {
            (true, _) => "Every byte verified.",
            (false, true) => "WRONG: see the column of errors above.",
            (false, false) => "NO GUEST could run here: see the reasons above, and run `ringpass probe`.",
        }
    }

    /// The report as a table.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        let cache = if self.disk.direct_io { "O_DIRECT" } else { "page cache: this measures the path, not the disk" };
        let _ = writeln!(
            text,
            "kernel {}, {} ({}, {cache})\n",
            self.kernel,
            printable(&self.disk.name),
            mib(self.disk.size_bytes)
        );
        let _ = writeln!(
            text,
            "{:<19}{:>6}{:>12}{:>10}{:>10}{:>10}{:>9}{:>10}{:>12}{:>8}",
            "way", "depth", "IOPS", "p50", "p99", "p99.9", "vs host", "exits/IO", "verified", "errors"
        );
        for row in &self.ways {
            let _ = writeln!(
                text,
                "{:<19}{:>6}{:>12.0}{:>10}{:>10}{:>10}{:>8.2}x{:>10}{:>12}{:>8}",
                row.name,
                row.depth,
                row.iops,
                time(row.p50_ns),
                time(row.p99_ns),
                time(row.p999_ns),
                row.ratio_to_host,
                row.exits_per_io.map_or_else(|| "-".into(), |exits| format!("{exits:.4}")),
                mib(row.verified_bytes),
                row.errors
            );
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "\nskipped {}: {}", skipped.name, printable(&skipped.why));
        }
        let _ = writeln!(text, "\n4 KiB random reads; vs host: p50 latency divided by the p50 of a host process.");
        let _ = writeln!(text, "{}", self.verdict());
        text
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

fn time(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{:.2} us", ns as f64 / 1e3),
        10_000..10_000_000 => format!("{:.0} us", ns as f64 / 1e3),
        _ => format!("{:.0} ms", ns as f64 / 1e6),
    }
}
