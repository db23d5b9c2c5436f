//! Compares ringpass as a vhost-user-blk back-end with `qemu-storage-daemon`, the usual alternative.
//!
//! The same client (libblkio's driver) does the same random 4 KiB reads and writes on the same file through both
//! servers, in alternating rounds. The benchmark compares the medians over the rounds. The client spins on the used
//! ring on one core, and the server is bound to another core. The file is in the page cache: this measures the path,
//! not a disk.
//!
//! `qemu-storage-daemon` runs with its best configuration: before the rounds the benchmark tries each `aio` engine and
//! several values of `poll-max-ns` for its iothread, and measures the fastest configuration for each operation and
//! depth.
//!
//! `cargo bench -p ringpass-benches --bench vhost_user_blk -- --help` shows the options. Needs two idle cores and, for the
//! comparison, `qemu-storage-daemon` (Debian: qemu-utils or qemu-system-common).

mod client;
mod report;
mod servers;

use std::{fs, io::Write, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use client::{Measurement, Operation};
use report::{Report, Row};
use servers::{QemuStorageDaemon, Ringpass, Server};

/// Compare ringpass with qemu-storage-daemon as vhost-user-blk back-ends.
#[derive(Debug, Parser)]
struct Args {
    /// Directory for the image. Use a file system with a page cache (ext4, XFS), not tmpfs.
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Size of the image.
    #[arg(long, default_value_t = 256)]
    size_mib: u64,
    /// Size of the writes that create the image. The page cache keeps large writes as large folios, and ext4 then walks
    /// all blocks of a folio for each write, which takes a good part of the time regardless of the server.
    #[arg(long, default_value_t = 1024)]
    piece_kib: usize,
    /// Number of alternating measurements of each server.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Duration of each measurement.
    #[arg(long, default_value_t = 500)]
    millis: u64,
    /// Number of requests in flight.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 32])]
    depths: Vec<u16>,
    /// The operations to measure.
    #[arg(long, value_delimiter = ',', default_values_t = [Operation::Read, Operation::Write])]
    operations: Vec<Operation>,
    /// Exit with an error unless every row has at least this ratio of IOPS and no worse p99.
    #[arg(long)]
    require_ratio: Option<f64>,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
    /// Passed by cargo; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    ensure!(args.rounds > 0 && args.millis > 0 && args.size_mib > 0, "rounds, millis and size must not be zero");
    ensure!(args.piece_kib > 0 && args.piece_kib % 4 == 0, "piece-kib must be a multiple of 4");
    let dir =
        tempfile::Builder::new().prefix("ringpass-bench-").tempdir_in(&args.dir).context("cannot make a directory")?;
    let image = dir.path().join("image");
    fill(&image, args.size_mib, args.piece_kib)?;
    let ringpass = Ringpass::build()?;
    let report = Comparison { args: &args, image, socket: dir.path().join("socket"), ringpass }.run()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(match args.require_ratio {
        Some(ratio) if !report.holds(ratio) => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

struct Comparison<'a> {
    args: &'a Args,
    image: PathBuf,
    socket: PathBuf,
    ringpass: Ringpass,
}

impl Comparison<'_> {
    fn run(&self) -> Result<Report> {
        let operations = &self.args.operations;
        let cases =
            operations.iter().flat_map(|&operation| self.args.depths.iter().map(move |&depth| (operation, depth)));
        let mut rows = Vec::new();
        for (operation, depth) in cases {
            let rival = self.best_rival(operation, depth)?;
            let mut ours = Vec::new();
            let mut theirs = Vec::new();
            for round in 0..self.args.rounds {
                progress(&format!("{operation} at depth {depth}, round {} of {}", round + 1, self.args.rounds));
                ours.push(self.measure(&self.ringpass, operation, depth, self.args.millis)?);
                theirs.push(self.measure(&rival, operation, depth, self.args.millis)?);
            }
            rows.push(Row::new(operation, depth, &ours, &theirs, rival.to_string()));
        }
        progress("");
        Report::new(rows, self.args.rounds, self.args.millis)
    }

    /// The configuration of `qemu-storage-daemon` with the most IOPS for this case.
    fn best_rival(&self, operation: Operation, depth: u16) -> Result<QemuStorageDaemon> {
        let mut best: Option<(f64, QemuStorageDaemon)> = None;
        for rival in QemuStorageDaemon::configurations() {
            progress(&format!("{operation} at depth {depth}: trying {rival}"));
            let iops = self.measure(&rival, operation, depth, self.args.millis.div_ceil(2))?.iops;
            if best.as_ref().is_none_or(|(most, _)| iops > *most) {
                best = Some((iops, rival));
            }
        }
        Ok(best.context("there is no configuration")?.1)
    }

    fn measure(&self, server: &dyn Server, operation: Operation, depth: u16, millis: u64) -> Result<Measurement> {
        let running = servers::start(server, &self.image, &self.socket)?;
        let measured = client::measure(&self.socket, operation, depth, Duration::from_millis(millis));
        running.stop()?;
        measured.with_context(|| format!("{operation} at depth {depth} through {}", server.name()))
    }
}

/// Creates the image. Every block has different bytes: no holes, and no content that compresses to one page.
fn fill(image: &PathBuf, size_mib: u64, piece_kib: usize) -> Result<()> {
    let mut file = fs::File::create(image).with_context(|| format!("cannot create {image:?}"))?;
    let mut piece = vec![0; piece_kib << 10];
    for _ in 0..(size_mib << 10) / piece_kib as u64 {
        fastrand::fill(&mut piece);
        file.write_all(&piece).with_context(|| format!("cannot fill {image:?}"))?;
    }
    file.sync_all().context("cannot sync the image")
}

/// Shows the progress in one line on a terminal.
fn progress(what: &str) {
    use std::io::IsTerminal as _;
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let _ = write!(stderr, "\r\x1b[K{what}");
        let _ = stderr.flush();
    }
}
