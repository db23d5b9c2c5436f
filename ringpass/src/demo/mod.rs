//! `ringpass demo`: compares the I/O of guests that have their own rings with the I/O of a plain host process.
//!
//! A *way* is one method to do I/O. In each round every way runs the same workload on the same disk in turn, so that
//! changes of the machine's speed affect all ways alike. Each way has its own part of a temporary image, fills it
//! through its own ring, rewrites random blocks before each round, and then reads and compares every block that it
//! reads.

pub(crate) mod guest;
mod host;
mod image;
mod kvm;
mod leftovers;
mod process;
mod report;
mod socket;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use ringpass_broker::disk::DirectIo;
use ringpass_broker::engine::EngineShape;
use ringpass_broker::kernel::KernelRelease;
use ringpass_broker::limits;
use ringpass_broker::printable::Chain;
use ringpass_broker::probe::{self, ModeName};
use ringpass_workload::{BlockQueue, Environment, Job, JobError, Report, Verify, Wait};

use crate::chosen_policy::{ChosenPolicy, PolicyArgs};
use crate::refusal;
use image::Image;
use kvm::{KvmWay, Signal};
use process::{ProcessWay, Submission};
use report::{DemoReport, DiskReport, Row, Skipped};
use socket::SocketWay;

/// Bytes of each request.
const BLOCK_BYTES: u64 = 4096;
/// Bytes of the disk area that each way uses alone.
const AREA_BYTES: u64 = 16 << 20;
/// Requests in flight.
const DEPTHS: [u32; 2] = [1, 32];
/// Bytes of guest memory for the buffers at the greatest depth.
const BUFFERS_BYTES: u64 = DEPTHS[1] as u64 * BLOCK_BYTES;
/// Number of alternating rounds. The reported ratio is the median over the rounds.
const ROUNDS: u32 = 7;
/// Blocks that a way rewrites before each round, so that its reads check them.
const REWRITES: u64 = 256;
/// How long an idle SQ thread polls before it sleeps. The pause between two ways is a few times longer, so that the SQ
/// thread of one way does not take a core from the next way.
const SQ_THREAD_IDLE: Duration = Duration::from_millis(10);
/// Number of files that the ways have open at the same time, with a reserve.
const FILES: u64 = 96;
/// A request without a completion after this time is an error.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Arguments of `ringpass demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Disk image or block device to use. The demo opens an existing file read-only and does not change it; it creates
    /// a missing file and removes it at the end. Default: a temporary image on a disk.
    #[arg(long, value_name = "F")]
    blk_file: Option<PathBuf>,
    /// How long each way of doing I/O runs at each depth, in seconds.
    #[arg(long, value_name = "N", default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Bypass the page cache. The demo then measures the disk more than the path to the disk.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = OnOff::Off)]
    direct_io: OnOff,
    #[command(flatten)]
    policy: PolicyArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnOff {
    On,
    Off,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be a number from 0.1 to 3600".into()),
    }
}

/// A way to do I/O that the demo measures, set up and ready.
pub(crate) trait DemoWay {
    /// The name in the report.
    fn name(&self) -> &'static str;

    /// Does `task` and returns the outcome.
    fn perform(&mut self, task: Task) -> anyhow::Result<Outcome>;
}

/// A task for a way.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Task {
    /// Write every block of the area once, instead of running `job`.
    pub(crate) prefill: bool,
    /// The workload.
    pub(crate) job: Job,
}

/// The outcome of a task.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Outcome {
    /// Counts and errors.
    pub(crate) report: Report,
    /// Latencies as (nanoseconds, requests).
    pub(crate) latencies: Vec<(u64, u64)>,
    /// VM exits of a virtual machine; `None` for other ways.
    pub(crate) exits: Option<ExitCounts>,
}

/// VM exits during a task.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct ExitCounts {
    /// All exits, including those for interrupts of the host.
    pub(crate) all: u64,
    /// Port I/O, MMIO and hypercalls.
    pub(crate) requested: u64,
}

/// The collected results of one way at one depth.
struct Tally {
    way: usize,
    depth: u32,
    latencies: Histogram<u64>,
    reads: u64,
    elapsed_ns: u64,
    ratios: Vec<f64>,
    exits: Option<ExitCounts>,
    total: Report,
}

/// Runs the demo and prints the report. Fails if any byte was wrong, or if no guest could run.
pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    leftovers::remove_at_signals()?;
    check_environment()?;
    let policy = args.policy.read()?;
    let direct_io = if args.direct_io == OnOff::On { DirectIo::On } else { DirectIo::Off };
    let image = Image::open(args.blk_file.as_deref(), direct_io)?;
    let mut skipped = Vec::new();
    let mut ways = make_ways(&image, policy, &mut skipped)?;
    // All guest memory exists by now (the limit covers memfds, too). From here on no guest can make the image larger.
    limits::cap_file_growth(&image.disk)?;

    let tallies = measure(&mut ways, &image, Duration::from_secs_f64(args.seconds))?;
    let report = DemoReport {
        kernel: KernelRelease::running().context("cannot ask for the kernel's release")?.to_string(),
        disk: DiskReport {
            name: image.name.clone(),
            size_bytes: image.disk.size_bytes(),
            direct_io: image.disk.is_direct_io(),
        },
        ways: tallies.iter().map(|tally| tally.row(ways[tally.way].name())).collect(),
        skipped,
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(if report.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Refuses to start if no way could run: the host process and all guests do their I/O through the kernel's io_uring.
fn check_environment() -> anyhow::Result<()> {
    probe::require_proc()?;
    // The demo is not confined and stays so.
    let engine = EngineShape::new(2, 128, Some(1));
    let report = probe::run(&probe::Server::new(engine).is_confined(false).may_offer_rings(false));
    refusal::unless_available(&report.context("cannot probe this machine")?, ModeName::Virtqueue)?;
    if let Err(error) = limits::raise_open_files() {
        tracing::warn!(%error, "cannot raise RLIMIT_NOFILE: the demo may skip some guests");
    }
    Ok(limits::OpenFiles::current().context("cannot count the open files")?.check(FILES)?)
}

/// Creates the reference and every guest that can run here. The reference comes first.
fn make_ways(image: &Image, policy: ChosenPolicy, skipped: &mut Vec<Skipped>) -> anyhow::Result<Vec<Box<dyn DemoWay>>> {
    let expected = image.expected()?;
    let mut ways: Vec<Box<dyn DemoWay>> = vec![Box::new(host::HostWay::new(&image.disk, expected.clone())?)];
    for submission in [Submission::SqThread, Submission::Kick] {
        match ProcessWay::start(&image.disk, policy, submission, &expected) {
            Ok(way) => ways.push(Box::new(way)),
            Err(error) => skipped.push(Skipped { name: submission.way(), why: Chain(error.as_ref()).to_string() }),
        }
    }
    match SocketWay::start(&image.disk, policy, &expected) {
        Ok(way) => ways.push(Box::new(way)),
        Err(error) => skipped.push(Skipped { name: socket::NAME, why: Chain(error.as_ref()).to_string() }),
    }
    for signal in [Signal::Poll, Signal::Interrupt, Signal::Kick] {
        match KvmWay::start(&image.disk, policy, signal, &expected) {
            Ok(way) => ways.push(Box::new(way)),
            Err(error) => skipped.push(Skipped { name: signal.way(), why: Chain(error.as_ref()).to_string() }),
        }
    }
    Ok(ways)
}

/// The part of a task that all ways share.
fn perform<Q: BlockQueue, E: Environment>(
    task: Task,
    queue: &mut Q,
    environment: &mut E,
    expected: &mut [u64],
) -> Result<Report, JobError> {
    let work = if task.prefill { ringpass_workload::prefill } else { ringpass_workload::run };
    work(&task.job, queue, environment, expected)
}

/// Creates a histogram for latencies from 1 ns to 100 s with three significant digits.
fn histogram() -> Histogram<u64> {
    let mut histogram = Histogram::new_with_bounds(1, 100_000_000_000, 3).expect("the bounds are valid");
    histogram.auto(true);
    histogram
}

/// Converts a histogram into pairs of (nanoseconds, requests).
fn pairs(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    histogram.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value())).collect()
}

/// Runs all rounds of all ways.
fn measure(ways: &mut [Box<dyn DemoWay>], image: &Image, each: Duration) -> anyhow::Result<Vec<Tally>> {
    let mut tallies: Vec<Tally> = (0..ways.len()).flat_map(|way| DEPTHS.map(|depth| Tally::new(way, depth))).collect();
    let progress = progress_bar(u64::from(ROUNDS) * tallies.len() as u64 + ways.len() as u64);
    if !image.is_preserved() {
        for (index, way) in ways.iter_mut().enumerate() {
            progress.set_message(format!("{} fills its part of the disk", way.name()));
            let job = Job { write_percent: 100, ..job(image, index, 32, Duration::ZERO, 0) };
            let outcome = way.perform(Task { prefill: true, job })?;
            tallies[index * DEPTHS.len()].total.merge(&outcome.report);
            progress.inc(1);
        }
    }
    for round in 0..ROUNDS {
        for depth in DEPTHS {
            let mut host_p50_ns = None;
            for tally in tallies.iter_mut().filter(|tally| tally.depth == depth) {
                let way = &mut ways[tally.way];
                progress.set_message(format!("{} at depth {depth}, round {} of {ROUNDS}", way.name(), round + 1));
                std::thread::sleep(SQ_THREAD_IDLE * 3);
                let seed = u64::from(round) << 32 | u64::from(depth);
                let job = job(image, tally.way, depth, each / ROUNDS, seed);
                if !image.is_preserved() {
                    let rewrite = Job { write_percent: 100, operations: REWRITES, duration_ns: 0, ..job };
                    tally.total.merge(&way.perform(Task { prefill: false, job: rewrite })?.report);
                }
                let outcome = way.perform(Task { prefill: false, job })?;
                let p50_ns = tally.add(&outcome);
                // The host comes first and sets the base.
                tally.ratios.push(p50_ns as f64 / *host_p50_ns.get_or_insert(p50_ns) as f64);
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();
    Ok(tallies)
}

/// A job of random verified reads.
fn job(image: &Image, way: usize, depth: u32, duration: Duration, seed: u64) -> Job {
    let (area_offset_bytes, area_bytes) = image.area(way);
    Job {
        area_offset_bytes,
        area_bytes,
        operations: 0,
        duration_ns: duration.as_nanos() as u64,
        timeout_ns: TIMEOUT.as_nanos() as u64,
        pause_ns: 0,
        seed,
        // Each way fills in the address of its buffers.
        buffers_gpa: 0,
        buffer_stride_bytes: BLOCK_BYTES,
        block_bytes: BLOCK_BYTES as u32,
        depth,
        write_percent: 0,
        durable_percent: 0,
        wait: Wait::Poll,
        verify: Verify::On,
    }
}

impl Tally {
    fn new(way: usize, depth: u32) -> Self {
        let (latencies, total) = (histogram(), Report::default());
        Self { way, depth, latencies, reads: 0, elapsed_ns: 0, ratios: Vec::new(), exits: None, total }
    }

    /// Adds a measured round. Returns the median latency of the round.
    fn add(&mut self, outcome: &Outcome) -> u64 {
        let mut round = histogram();
        for &(latency_ns, count) in &outcome.latencies {
            round.saturating_record_n(latency_ns, count);
        }
        self.latencies += &round;
        if let Some(exits) = outcome.exits {
            let sum = self.exits.get_or_insert_default();
            sum.all += exits.all;
            sum.requested += exits.requested;
        }
        self.reads += outcome.report.reads;
        self.elapsed_ns += outcome.report.elapsed_ns;
        self.total.merge(&outcome.report);
        round.value_at_quantile(0.5).max(1)
    }

    fn row(&self, name: &'static str) -> Row {
        let total = &self.total;
        Row {
            name,
            depth: self.depth,
            iops: self.reads as f64 / Duration::from_nanos(self.elapsed_ns.max(1)).as_secs_f64(),
            p50_ns: self.latencies.value_at_quantile(0.5),
            p99_ns: self.latencies.value_at_quantile(0.99),
            p999_ns: self.latencies.value_at_quantile(0.999),
            ratio_to_host: median(&self.ratios),
            exits_per_io: self.exits.map(|exits| exits.all as f64 / self.reads.max(1) as f64),
            requested_exits_per_io: self.exits.map(|exits| exits.requested as f64 / self.reads.max(1) as f64),
            verified_bytes: total.verified_bytes,
            errors: total.mismatches + total.errors + total.unexpected + total.lost + total.missed_interrupts,
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A progress bar, drawn on standard error if that is a terminal.
fn progress_bar(length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {msg}").expect("the template is right");
    ProgressBar::new(length).with_style(style)
}
