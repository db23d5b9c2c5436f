//! Decides whether a served device offers rings, and how they are set up.

use std::num::NonZeroU32;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use ringpass_broker::direct::{DirectConfig, SubmissionConfig};
use ringpass_broker::disk::LocatedDisk;
use ringpass_broker::engine::AttachConfig;
use ringpass_broker::kernel::{self, KernelRelease, Verdict};
use ringpass_broker::memory::Sharing;
use ringpass_broker::probe::{ModeName, Report};
use ringpass_broker::ring::{IoWorkers, SqThread, SqThreadConfig};
use ringpass_broker::ring_host::{Confinement, RingHost};
use ringpass_broker::virtio_blk::BlkConfig;
use ringpass_restrictions::Access;

use super::sandbox::SandboxArgs;
use super::{finer_blocks, write_chains};
use crate::chosen_policy::{ChosenPolicy, PolicyArgs};
use crate::{log, refusal};

/// A longer time is most likely given in the wrong unit.
const SQ_IDLE_MAX_MS: u64 = 60_000;
/// A ring cannot have more blocking requests under way.
const IO_WORKERS_MAX: u32 = 4096;

/// Options for rings.
#[derive(Debug, Args)]
pub(super) struct RingArgs {
    /// Whether guests with a ringpass driver can use rings of the host's io_uring. The server then pins the guest's
    /// memory: suitable for guests without balloon, free page reporting, virtio-mem and postcopy.
    #[arg(long, value_enum, value_name = "MODE", default_value_t = ModeArg::Auto)]
    mode: ModeArg,

    /// What consumes the requests on a guest's ring: a polling kernel thread, or this process at each doorbell.
    #[arg(long, value_enum, value_name = "WHO", default_value_t = SubmissionArg::SqThread)]
    submission: SubmissionArg,

    /// How long the polling kernel thread polls after the last request before it sleeps, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=SQ_IDLE_MAX_MS))]
    sq_idle_ms: u64,

    /// CPU of the polling kernel thread. Use a CPU that runs nothing else.
    #[arg(long, value_name = "CPU")]
    sq_cpu: Option<u32>,

    /// Maximum number of kernel threads for those requests of a ring that would block.
    #[arg(long, value_name = "N", default_value_t = IoWorkers::default().bounded, value_parser = io_workers)]
    io_workers: NonZeroU32,

    /// Maximum number of SQ entries of a guest's ring: a power of two. A CPU of the host executes up to that many requests
    /// before it does something else. For guests whose memory ends above 64 GiB the number is halved for each doubling,
    /// down to 8.
    #[arg(long, value_name = "N", default_value_t = AttachConfig::SQ_ENTRIES_MAX_DEFAULT, value_parser = sq_entries)]
    sq_entries_max: u32,

    /// Maximum number of CQ entries of a guest's ring, which is the maximum number of outstanding requests: a power of
    /// two. Each takes up to 20 KiB of kernel memory. Halved for larger guests, as the SQ entries are, down to 64.
    #[arg(long, value_name = "N", default_value_t = AttachConfig::CQ_ENTRIES_MAX_DEFAULT, value_parser = cq_entries)]
    cq_entries_max: u32,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// How the device may execute queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeArg {
    /// Rings if this kernel is known to be suitable, otherwise virtqueues only.
    Auto,
    /// Rings even on kernels with known holes. If rings are not possible, the server does not start.
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
    /// The device offers rings.
    Rings(Box<AttachConfig>),
    /// The device offers no rings, for these reasons.
    No(Vec<String>),
}

impl Offer {
    /// The engine's configuration for rings.
    pub(crate) fn config(&self) -> Option<AttachConfig> {
        match self {
            Self::Rings(config) => Some((**config).clone()),
            Self::No(_) => None,
        }
    }
}

impl ModeArg {
    /// The name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Direct => "direct",
            Self::Virtqueue => "virtqueue",
        }
    }
}

/// Forks the process that makes the rings of guests, if the device offers rings.
///
/// # Errors
///
/// The kernel makes no process.
pub(super) fn start_host(
    offer: &Offer,
    device: &BlkConfig,
    disk: &LocatedDisk,
    sandbox: &SandboxArgs,
) -> anyhow::Result<Option<RingHost>> {
    let Some(config) = offer.config() else { return Ok(None) };
    let confinement = if sandbox.is_on() { Confinement::On } else { Confinement::Off };
    let host = RingHost::fork(config, device.num_queues(), disk.anchor(), confinement, log::write_in_background)?;
    Ok(Some(host))
}

fn io_workers(text: &str) -> Result<NonZeroU32, String> {
    let workers = text.parse::<NonZeroU32>().ok().filter(|workers| workers.get() <= IO_WORKERS_MAX);
    workers.ok_or_else(|| format!("must be a number from 1 to {IO_WORKERS_MAX}; 4 to 64 keep a disk busy"))
}

fn sq_entries(text: &str) -> Result<u32, String> {
    power_of_two(text, 8, 32_768)
}

fn cq_entries(text: &str) -> Result<u32, String> {
    power_of_two(text, 64, 65_536)
}

fn power_of_two(text: &str, min: u32, max: u32) -> Result<u32, String> {
    let entries = text.parse().ok().filter(|entries: &u32| entries.is_power_of_two() && (min..=max).contains(entries));
    entries.ok_or_else(|| format!("must be a power of two from {min} to {max}"))
}

impl RingArgs {
    /// Refuses a CQ that is smaller than the SQ.
    ///
    /// # Errors
    ///
    /// Names both options.
    pub(super) fn check_entries(&self) -> anyhow::Result<()> {
        let (sq, cq) = (self.sq_entries_max, self.cq_entries_max);
        ensure!(sq <= cq, "--cq-entries-max {cq} is smaller than --sq-entries-max {sq}: a CQ needs as many entries");
        Ok(())
    }

    /// Checks that the polling kernel thread can run on the CPU of `--sq-cpu`, even if no such thread will start.
    ///
    /// # Errors
    ///
    /// The CPU does not exist, or this process may not use it.
    pub(super) fn check_sq_cpu(&self) -> anyhow::Result<()> {
        if self.sq_cpu.is_some() {
            SqThread::new(SqThreadConfig::default().cpu(self.sq_cpu)).context("--sq-cpu")?;
        }
        Ok(())
    }

    pub(super) fn mode(&self) -> ModeArg {
        self.mode
    }

    /// Reads the policy of the rings, even if the device offers none: the operator must learn of a mistake now, not
    /// when the policy is first used.
    ///
    /// # Errors
    ///
    /// The policy cannot be read.
    pub(super) fn policy(&self) -> anyhow::Result<ChosenPolicy> {
        self.policy.read()
    }

    /// Decides whether the device offers rings.
    ///
    /// # Errors
    ///
    /// `--mode direct` demands rings and they are not possible, or the policy would let a guest escape.
    pub(super) fn offer(&self, disk: &LocatedDisk, policy: ChosenPolicy, report: &Report) -> anyhow::Result<Offer> {
        if self.mode == ModeArg::Virtqueue {
            return Ok(Offer::No(vec!["--mode virtqueue".into()]));
        }
        let why_not = self.why_not(disk, report)?;
        if !why_not.is_empty() {
            if self.mode == ModeArg::Direct {
                bail!("--mode direct: rings are not possible here: {}", why_not.join("; "));
            }
            tracing::info!("rings not offered, guests get virtqueues only: {}", why_not.join("; "));
            return Ok(Offer::No(why_not));
        }
        let support = kernel::support().context("cannot ask the kernel what its io_uring can do")?;
        let policy = policy.compile(Access::ReadWrite, &support).context("the policy of the guests' rings")?;
        let submission = match self.submission {
            SubmissionArg::SqThread => {
                SubmissionConfig::SqThread(SqThreadConfig::new(Duration::from_millis(self.sq_idle_ms)).cpu(self.sq_cpu))
            }
            SubmissionArg::Doorbell => SubmissionConfig::Doorbell,
        };
        let workers = IoWorkers { bounded: self.io_workers, ..IoWorkers::default() };
        let direct = DirectConfig::new(submission, Sharing::for_kernel(&support)).workers(workers);
        let attach = AttachConfig::new(direct, policy)?.entries_max(self.sq_entries_max, self.cq_entries_max)?;
        Ok(Offer::Rings(Box::new(attach)))
    }

    /// The reasons why rings are not possible, each with what to do. Empty: rings are possible.
    fn why_not(&self, disk: &LocatedDisk, report: &Report) -> anyhow::Result<Vec<String>> {
        let mut why_not = Vec::new();
        if disk.is_read_only() {
            why_not.push(
                "the disk is read-only: other servers can share its lock, so a restarted server could not tell when the I/O \
                 of a killed server has ended"
                    .into(),
            );
        }
        why_not.extend(finer_blocks::why_no_rings(disk));
        if let Some(profile) = disk.integrity_profile()? {
            why_not.push(format!(
                "the device keeps protection information ({profile}), and no restriction prevents a guest from naming memory of the \
                 server as its buffer"
            ));
        }
        why_not.extend(write_chains::why_no_rings(disk, self.mode == ModeArg::Direct));
        if let Some(mode) = report.mode(ModeName::DirectGuestRam).filter(|mode| !mode.available && why_not.is_empty()) {
            why_not.push(refusal::one_line(mode));
        }
        match KernelRelease::running()?.verdict() {
            Verdict::DirectByDefault => {}
            verdict @ Verdict::DirectWithWarning => tracing::warn!("rings offered: {}", verdict.advice()),
            verdict if self.mode == ModeArg::Direct => tracing::warn!("--mode direct: {}", verdict.advice()),
            verdict => why_not.push(format!("{} (--mode direct overrules this)", verdict.advice())),
        }
        Ok(why_not)
    }
}
