//! A process as a guest: the broker's side.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ringpass_broker::direct::{DirectConfig, DirectDevice, DirectQueue, QueueConfig, QueuePlacement, SubmissionConfig};
use ringpass_broker::disk::Disk;
use ringpass_broker::kernel;
use ringpass_broker::memory::{GuestMemory, RegionConfig, Sharing};
use ringpass_broker::ring::{RingConfig, SqThreadConfig};
use ringpass_guest::handover::{self, QueueEvents, QueueSetup, RegionSetup, Setup};
use ringpass_guest_abi::{rings_area_bytes, sqes_area_bytes};
use ringpass_restrictions::Access;
use rustix::fs::MemfdFlags;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::{DemoWay, Outcome, SQ_THREAD_IDLE, TIMEOUT, Task, guest};
use crate::chosen_policy::ChosenPolicy;

/// Size of the guest's RAM. It is small because the demo pins it, and an ordinary user may pin 8 MiB in total.
const RAM_BYTES: u64 = 1 << 20;
const RING: RingConfig = RingConfig { sq_entries: 64, cq_entries: 128 };
/// Time-out for the end of a guest process, and for the end of its ring.
const END: Duration = Duration::from_secs(10);

/// What consumes the requests on the guest's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Submission {
    /// A polling kernel thread.
    SqThread,
    /// The broker, at each doorbell.
    Kick,
}

impl Submission {
    /// The way's name in the report.
    pub(crate) fn way(self) -> &'static str {
        match self {
            Self::SqThread => "process",
            Self::Kick => "process-kick",
        }
    }
}

/// A guest process with its own ring, and the broker's side.
pub(crate) struct ProcessWay {
    submission: Submission,
    stream: Option<BufReader<UnixStream>>,
    guest: Child,
    queue: Option<DirectQueue>,
}

impl ProcessWay {
    /// Starts a guest process on `disk`. `expected` are the checksums of the blocks of its area.
    pub(crate) fn start(
        disk: &Arc<Disk>,
        policy: ChosenPolicy,
        submission: Submission,
        expected: &[u64],
    ) -> anyhow::Result<Self> {
        let ram = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC).context("cannot make the guest's RAM")?;
        rustix::fs::ftruncate(&ram, RAM_BYTES).context("cannot make the guest's RAM")?;
        let ram = Arc::new(File::from(ram));
        let region = RegionConfig { gpa: 0, len_bytes: RAM_BYTES, file: ram.clone(), file_offset_bytes: 0 };
        let memory = GuestMemory::new([region])?;

        let support = kernel::support().context("cannot ask the kernel what its io_uring can do")?;
        let access = if disk.is_read_only() { Access::ReadOnly } else { Access::ReadWrite };

        let submission_config = match submission {
            Submission::SqThread => SubmissionConfig::SqThread(SqThreadConfig::new(SQ_THREAD_IDLE)),
            Submission::Kick => SubmissionConfig::Doorbell,
        };
        let config = DirectConfig::new(submission_config, Sharing::for_kernel(&support));
        let policy = policy.compile(access, &support)?;
        let device = DirectDevice::new(disk.clone(), &memory, policy, config)?;

        let (rings_gpa, sqes_gpa) = (0, rings_area_bytes(RING.cq_entries));
        assert!(sqes_gpa + sqes_area_bytes(RING.sq_entries) <= RAM_BYTES / 2, "half of the RAM is for buffers");
        let events = QueueEvents { doorbell: eventfd()?, completion: eventfd()? };
        let config = QueueConfig::new(RING, QueuePlacement::GuestRam { rings_gpa, sqes_gpa })
            .doorbell(events.doorbell.try_clone().context("cannot share the doorbell")?)
            .completion(events.completion.try_clone().context("cannot share the completion eventfd")?);
        let queue = device.attach(config)?;

        let addressing = queue.addressing();
        let setup = Setup {
            version: Setup::VERSION,
            regions: vec![RegionSetup { gpa: 0, len_bytes: RAM_BYTES, offset_bytes: 0 }],
            queues: vec![QueueSetup { rings_gpa, sqes_gpa, layout: *queue.layout() }],
            iova_base: addressing.iova_base(),
            slot_shift: addressing.slot_shift(),
            disk_bytes: disk.size_bytes(),
            logical_block_bytes: disk.logical_block_bytes(),
            read_only: disk.is_read_only(),
        };
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket")?;
        let guest = Command::new("/proc/self/exe")
            .arg(guest::COMMAND)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start the guest process")?;
        let mut way = Self { submission, stream: Some(BufReader::new(ours)), guest, queue: Some(queue) };
        handover::send(way.stream()?.get_ref(), &setup, &[ram.as_fd()], &[events])?;
        way.send(&expected)?;
        Ok(way)
    }

    fn stream(&mut self) -> anyhow::Result<&mut BufReader<UnixStream>> {
        self.stream.as_mut().context("the guest has been stopped")
    }

    fn send(&mut self, message: &impl serde::Serialize) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.stream()?.get_mut().write_all(&line).context("cannot send a task to the guest process")
    }
}

impl DemoWay for ProcessWay {
    fn name(&self) -> &'static str {
        self.submission.way()
    }

    fn perform(&mut self, task: Task) -> anyhow::Result<Outcome> {
        self.send(&task)?;
        let patience = Duration::from_nanos(task.job.duration_ns) + TIMEOUT * 2;
        self.stream()?
            .get_ref()
            .set_read_timeout(Some(patience))
            .context("cannot set a time-out for the guest process")?;
        let mut line = String::new();
        self.stream()?.read_line(&mut line).context("no answer from the guest process")?;
        if line.is_empty() {
            bail!("the guest process has ended ({})", self.guest.wait()?);
        }
        serde_json::from_str(&line).context("cannot parse the answer of the guest process")
    }
}

impl Drop for ProcessWay {
    fn drop(&mut self) {
        // The guest process ends when its socket closes, unless it hangs.
        drop(self.stream.take());
        let started = Instant::now();
        while matches!(self.guest.try_wait(), Ok(None)) && started.elapsed() < END {
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Err(error) = self.guest.kill().and_then(|()| self.guest.wait()) {
            tracing::warn!(%error, "cannot end the guest process");
        }
        if let Some(Err(error)) = self.queue.take().map(|queue| DirectQueue::close(queue).wait(END)) {
            tracing::warn!("{error}");
        }
    }
}

fn eventfd() -> anyhow::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC).context("cannot make an eventfd")
}
