//! A guest that requests its ring over the vhost-user socket of a served disk.
//!
//! Server and guest are threads of this process, because this process holds the lock of the image. They are connected
//! by the socket, and later only by guest RAM.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, bail};
use ringpass_broker::direct::{DirectConfig, SubmissionConfig};
use ringpass_broker::disk::Disk;
use ringpass_broker::engine::{AttachConfig, DiskSource, Engine, EngineConfig, EngineControl};
use ringpass_broker::kernel;
use ringpass_broker::memory::Sharing;
use ringpass_broker::ring::SqThreadConfig;
use ringpass_broker::vhost_user::{Server, ServerHandle};
use ringpass_broker::virtio_blk::{BlkConfig, BlkParameters};
use ringpass_guest::vhost_user::{Disk as GuestDisk, ExecutedBy, Options, Queue, RingSize, Way};
use ringpass_restrictions::Access;
use ringpass_workload::{Job, ProcessEnv};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::leftovers::{self, Leftover};
use super::{BUFFERS_BYTES, DemoWay, Outcome, SQ_THREAD_IDLE, Task, perform};
use crate::chosen_policy::ChosenPolicy;

/// Size of the guest's RAM. It is small because the server pins it.
const RAM_BYTES: u64 = 1 << 20;
/// Descriptors of a virtqueue. A third of that number of requests can be outstanding.
const QUEUE_SIZE: u16 = 128;

/// The way's name in the report.
pub(crate) const NAME: &str = "process-vhost-user";

/// A served disk, and the guest connected to its socket.
pub(crate) struct SocketWay {
    // The drop order: the guest releases its ring, then the server ends.
    queue: Queue,
    environment: ProcessEnv,
    buffers_gpa: u64,
    expected: Vec<u64>,
    _guest: GuestDisk,
    _server: ServerThread,
}

/// A disk source that has the disk from the beginning and keeps it.
struct OwnDisk(Arc<Disk>);

impl DiskSource for OwnDisk {
    fn request(&mut self) {}

    fn stop_waiting(&mut self) {}

    fn release(&mut self, _is_wanted: &dyn Fn() -> bool) {}

    fn refresh_size_bytes(&mut self) -> Result<u64, Box<dyn Error + Send + Sync>> {
        Ok(self.0.size_bytes())
    }
}

/// The thread that serves the disk until the value is dropped.
struct ServerThread {
    handle: ServerHandle,
    engine: EngineControl,
    thread: Option<JoinHandle<()>>,
    directory: Leftover,
}

impl SocketWay {
    /// Serves `disk`, and gets a ring for the guest. `expected` are the checksums of the blocks of its area.
    pub(crate) fn start(disk: &Arc<Disk>, policy: ChosenPolicy, expected: &[u64]) -> anyhow::Result<Self> {
        let server = ServerThread::start(disk, policy)?;
        let options = Options::default()
            .memory_bytes(RAM_BYTES)
            .queues(1)
            .queue_size(QUEUE_SIZE)
            .ring(RingSize { sq_entries: 64, cq_entries: 128 })
            .way(Way::Ring);
        let guest = GuestDisk::connect(server.socket(), options)?;
        let queue = guest.queue(1).map_err(|error| {
            // The device tells the guest only an error number; the server knows the reason.
            let why = server.engine.rings().and_then(|rings| rings.queues.get(1)?.refused.clone());
            why.map_or_else(|| error.into(), |refused| anyhow::anyhow!("{}", refused.why))
        })?;
        let buffers = guest.allocate(BUFFERS_BYTES)?;
        let buffers_gpa = buffers.gpa();
        let doorbell = EventFd::new(EFD_CLOEXEC).context("cannot make an eventfd")?;
        let interrupt = queue.interrupt().try_clone().context("cannot share an eventfd")?;
        let environment = ProcessEnv::new(buffers, doorbell, interrupt);
        Ok(Self { queue, environment, buffers_gpa, expected: expected.to_vec(), _guest: guest, _server: server })
    }
}

impl DemoWay for SocketWay {
    fn name(&self) -> &'static str {
        NAME
    }

    fn perform(&mut self, task: Task) -> anyhow::Result<Outcome> {
        let task = Task { job: Job { buffers_gpa: self.buffers_gpa, ..task.job }, ..task };
        // SAFETY: the workload accesses a buffer only while no request in flight uses it.
        let mut queue = unsafe { self.queue.by_address() };
        let report = perform(task, &mut queue, &mut self.environment, &mut self.expected)?;
        let latencies = super::pairs(&self.environment.take_latencies_ns()?);
        if !matches!(self.queue.executed_by(), ExecutedBy::Ring { .. }) {
            bail!("the guest has lost its ring: {:?}", self.queue.executed_by());
        }
        Ok(Outcome { report, latencies, exits: None })
    }
}

impl ServerThread {
    fn start(disk: &Arc<Disk>, policy: ChosenPolicy) -> anyhow::Result<Self> {
        let directory = leftovers::directory("ringpass-demo-")?;
        let device = BlkConfig::new(
            BlkParameters::new(disk.size_bytes())
                .logical_block_bytes(disk.logical_block_bytes())
                .physical_block_bytes(disk.physical_block_bytes())
                .read_only(disk.is_read_only())
                .num_queues(2)
                .queue_size(QUEUE_SIZE),
        )?;
        let support = kernel::support().context("cannot ask the kernel what its io_uring can do")?;
        let access = if disk.is_read_only() { Access::ReadOnly } else { Access::ReadWrite };
        let direct = DirectConfig::new(
            SubmissionConfig::SqThread(SqThreadConfig::new(SQ_THREAD_IDLE)),
            Sharing::for_kernel(&support),
        );
        let attach = AttachConfig::new(direct, policy.compile(access, &support)?)?;
        let config = EngineConfig::new(device).workers(1).attach(attach);
        let source = OwnDisk(disk.clone());
        let mut engine = Engine::new(config, |_| -> io::Result<Box<dyn DiskSource>> { Ok(Box::new(source)) })?;
        let control = engine.control();
        control.set_disk(disk);
        let server = Server::bind(&directory.path().join("socket"))?;
        let handle = server.handle();
        let thread = thread::Builder::new()
            .name("demo-server".into())
            .spawn(move || {
                if let Err(error) = server.run(&mut engine) {
                    tracing::warn!(%error, "the demo's server has failed");
                }
                engine.shutdown();
            })
            .context("cannot start the server's thread")?;
        Ok(Self { handle, engine: control, thread: Some(thread), directory })
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("socket")
    }
}

impl Drop for ServerThread {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            // The thread does not panic. If it did, there would be nothing left to do.
            let _ = thread.join();
        }
    }
}
