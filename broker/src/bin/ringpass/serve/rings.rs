//! Whether a served device offers rings, and which.

use std::num::NonZeroU32;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use ringpass_broker::direct::{DirectConfig, SubmissionConfig};
use ringpass_broker::disk::LocatedDisk;
use ringpass_broker::engine::AttachConfig;
use ringpass_broker::kernel::{self, KernelRelease, Verdict};
use ringpass_broker::memory::Sharing;
use ringpass_broker::probe::{ModeName, Report};
use ringpass_broker::ring::{IoWorkers, SqThread, SqThreadConfig};
use ringpass_restrictions::Access;

use super::finer_blocks;
use crate::chosen_policy::{ChosenPolicy, PolicyArgs};
use crate::refusal;

/// Longer polling would be a mistake in the unit.
const SQ_IDLE_MAX_MS: u64 = 60_000;
/// A ring has no more requests under way that could block.
const IO_WORKERS_MAX: u32 = 4096;

/// The options about rings.
#[derive(Debug, Args)]
pub(super) struct RingArgs {
    /// Whether guests with a ringpass driver can have the host's io_uring itself. Their memory is then pinned: for guests without
    /// balloon, free page reporting, virtio-mem and postcopy.
    #[arg(long, value_enum, value_name = "MODE", default_value_t = ModeArg::Auto)]
    mode: ModeArg,

    /// Who takes a guest's requests off its ring: a kernel thread that polls, or this process at each doorbell.
    #[arg(long, value_enum, value_name = "WHO", default_value_t = SubmissionArg::SqThread)]
    submission: SubmissionArg,

    /// How long the polling kernel thread looks for requests after the last one before it sleeps, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=SQ_IDLE_MAX_MS))]
    sq_idle_ms: u64,

    /// CPU of the polling kernel thread, which should have it to itself.
    #[arg(long, value_name = "CPU")]
    sq_cpu: Option<u32>,

    /// Most kernel threads for requests of a ring that would block.
    #[arg(long, value_name = "N", default_value_t = IoWorkers::default().bounded, value_parser = io_workers)]
    io_workers: NonZeroU32,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// How queues may be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeArg {
    /// Rings if this kernel is known to be good for that, otherwise virtqueues only.
    Auto,
    /// Rings also on kernels with known holes; without rings the server does not start.
    Direct,
    /// Virtqueues only.
    Virtqueue,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SubmissionArg {
    SqThread,
    Doorbell,
}

/// Whether the device offers rings.
#[derive(Debug)]
pub(crate) enum Offer {
    /// It does.
    Rings(Box<AttachConfig>),
    /// It does not, and why.
    No(Vec<String>),
}

impl Offer {
    /// For the engine.
    pub(crate) fn config(&self) -> Option<AttachConfig> {
        match self {
            Self::Rings(config) => Some((**config).clone()),
            Self::No(_) => None,
        }
    }
}

impl ModeArg {
    /// As on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Direct => "direct",
            Self::Virtqueue => "virtqueue",
        }
    }
}

fn io_workers(text: &str) -> Result<NonZeroU32, String> {
    let workers = text.parse::<NonZeroU32>().ok().filter(|workers| workers.get() <= IO_WORKERS_MAX);
    workers.ok_or_else(|| format!("must be a number from 1 to {IO_WORKERS_MAX}; a disk is kept busy by 4 to 64"))
}

impl RingArgs {
    /// Whether the polling kernel thread can have the CPU that it is to have, whether or not there will be such a thread.
    ///
    /// # Errors
    ///
    /// The CPU is not there, or this process may not use it.
    pub(super) fn check_sq_cpu(&self) -> anyhow::Result<()> {
        if self.sq_cpu.is_some() {
            SqThread::new(SqThreadConfig { cpu: self.sq_cpu, ..SqThreadConfig::default() }).context("--sq-cpu")?;
        }
        Ok(())
    }

    pub(super) fn mode(&self) -> ModeArg {
        self.mode
    }

    /// Reads the policy of rings, whether or not they will be offered: a mistake in it must not wait for the day on which it
    /// is used.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub(super) fn policy(&self) -> anyhow::Result<ChosenPolicy> {
        self.policy.read()
    }

    /// Decides.
    ///
    /// # Errors
    ///
    /// Rings are insisted on and cannot be had; a policy that would let a guest out.
    pub(super) fn offer(&self, disk: &LocatedDisk, policy: ChosenPolicy, report: &Report) -> anyhow::Result<Offer> {
        if self.mode == ModeArg::Virtqueue {
            return Ok(Offer::No(vec!["--mode virtqueue".into()]));
        }
        let why_not = self.why_not(disk, report)?;
        if !why_not.is_empty() {
            if self.mode == ModeArg::Direct {
                bail!("--mode direct: guests cannot have rings here: {}", why_not.join("; "));
            }
            tracing::info!("guests get virtqueues only: {}", why_not.join("; "));
            return Ok(Offer::No(why_not));
        }
        let support = kernel::support().context("asking the kernel what its io_uring can do")?;
        let policy = policy.compile(Access::ReadWrite, &support).context("the policy of guests' rings")?;
        let submission = match self.submission {
            SubmissionArg::SqThread => SubmissionConfig::SqThread(SqThreadConfig {
                idle: Duration::from_millis(self.sq_idle_ms),
                cpu: self.sq_cpu,
            }),
            SubmissionArg::Doorbell => SubmissionConfig::Doorbell,
        };
        let workers = IoWorkers { bounded: self.io_workers, ..IoWorkers::default() };
        let direct = DirectConfig { submission, workers, sharing: Sharing::for_kernel(&support) };
        Ok(Offer::Rings(Box::new(AttachConfig::new(direct, policy)?)))
    }

    /// What stands in the way of rings, each with what to do. Nothing: they can be had.
    fn why_not(&self, disk: &LocatedDisk, report: &Report) -> anyhow::Result<Vec<String>> {
        let mut why_not = Vec::new();
        if disk.is_read_only() {
            why_not.push(
                "the disk is read-only: its lock is shared with other servers, so a restarted one could not tell when the \
                 I/O of a killed one has ended"
                    .into(),
            );
        }
        why_not.extend(finer_blocks::why_no_rings(disk));
        if let Some(mode) = report.mode(ModeName::DirectGuestRam).filter(|mode| !mode.available && why_not.is_empty()) {
            why_not.push(refusal::one_line(mode));
        }
        match KernelRelease::running()?.verdict() {
            Verdict::DirectByDefault => {}
            verdict @ Verdict::DirectWithWarning => tracing::warn!("guests can have rings, {}", verdict.advice()),
            verdict if self.mode == ModeArg::Direct => tracing::warn!("--mode direct: {}", verdict.advice()),
            verdict => why_not.push(format!("{} (--mode direct overrules this)", verdict.advice())),
        }
        Ok(why_not)
    }
}
