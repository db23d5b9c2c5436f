//! A guest with the repository's driver, on a disk whose queues become rings of `ringpass serve`.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::{BlockDriver, LinuxGuest, LinuxGuestConfig, VhostUserDisk};
use crate::{
    broker_process::{self, BrokerProcess},
    disks::{DiskKind, TestDisk},
    needs::Need,
};

/// A script that waits until every queue of `/dev/vda` that can have a ring has one. For another disk: replace the name.
pub const AWAIT_RINGS: &str = "tries=0
    until [ \"$(cat /sys/block/vda/ringpass/queue[1-9]*/mode | sort -u)\" = ring ]; do
        usleep 20000
        tries=$((tries + 1))
        if [ $tries = 1500 ]; then
            grep . /sys/block/vda/ringpass/*/*
            dmesg | tail
            exit 1
        fi
    done";

/// How long a load may take for a few requests.
const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// What such a guest needs of the machine.
pub fn needs() -> Vec<Need> {
    [super::needs(), broker_process::needs(), DiskKind::Ext4Direct.needs()].into_iter().flatten().collect()
}

/// The disk of a broker, and how the broker serves it.
#[derive(Clone, Debug)]
pub struct Serving {
    /// The kind of the disk on the host.
    pub kind: DiskKind,
    /// Its size.
    pub size_bytes: u64,
    /// The queues of the device: one for each CPU of the guest, and queue 0, which has no ring.
    pub queues: u16,
    /// Further arguments of `ringpass serve`.
    pub arguments: Vec<String>,
}

impl Default for Serving {
    /// A file with direct I/O, for two CPUs.
    fn default() -> Self {
        Self { kind: DiskKind::Ext4Direct, size_bytes: 64 << 20, queues: 3, arguments: Vec::new() }
    }
}

impl Serving {
    /// Adds arguments of `ringpass serve`.
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    fn start(&self, socket: &Path, disk: &Path, further: &[&str]) -> Result<BrokerProcess> {
        let queues = self.queues.to_string();
        let mut arguments = vec!["--num-queues", &queues];
        arguments.extend(self.arguments.iter().map(String::as_str));
        arguments.extend(further);
        BrokerProcess::start(socket, disk, &arguments)
    }
}

/// A disk and the broker that serves it.
#[derive(Debug)]
pub struct ServedDisk {
    /// The broker, which the test may kill.
    pub broker: BrokerProcess,
    serving: Serving,
    path: PathBuf,
    directory: tempfile::TempDir,
    // The last: it goes when nothing has it open any more.
    disk: Option<Arc<TestDisk>>,
}

impl ServedDisk {
    /// Serves a new disk as [`Serving::default`] says.
    ///
    /// # Errors
    ///
    /// The broker does not start.
    pub fn new() -> Result<Self> {
        Self::serve(Serving::default())
    }

    /// Serves a new disk.
    ///
    /// # Errors
    ///
    /// The machine cannot have this disk, or the broker does not start.
    pub fn serve(serving: Serving) -> Result<Self> {
        let disk = Arc::new(TestDisk::new(serving.kind, serving.size_bytes)?);
        Self::start(disk.path().to_owned(), Some(disk), serving, &[])
    }

    /// Serves a disk of the test's own, which must live longer than this.
    ///
    /// # Errors
    ///
    /// The broker does not start.
    pub fn at(path: &Path, serving: Serving) -> Result<Self> {
        Self::start(path.to_owned(), None, serving, &[])
    }

    /// Another broker for the same disk, to which a guest can migrate.
    ///
    /// # Errors
    ///
    /// The broker does not start.
    pub fn destination(&self) -> Result<Self> {
        Self::start(self.path.clone(), self.disk.clone(), self.serving.clone(), &["--incoming"])
    }

    fn start(path: PathBuf, disk: Option<Arc<TestDisk>>, serving: Serving, further: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a directory for a socket")?;
        let broker = serving.start(&socket(&directory), &path, further)?;
        Ok(Self { broker, serving, path, directory, disk })
    }

    /// Starts the broker again that the test has killed.
    ///
    /// # Errors
    ///
    /// The broker does not start.
    pub fn start_again(&mut self) -> Result<()> {
        self.start_again_with(&[]).map(drop)
    }

    /// Starts the broker again, with further arguments, and returns the former one. That one has had its SIGKILL, and may
    /// still have to wait for its I/O before it ends.
    ///
    /// # Errors
    ///
    /// The broker does not start.
    pub fn start_again_with(&mut self, further: &[&str]) -> Result<BrokerProcess> {
        let broker = self.serving.start(&socket(&self.directory), &self.path, further)?;
        Ok(std::mem::replace(&mut self.broker, broker))
    }

    /// Writes to the disk behind the broker's back, before a guest has it.
    ///
    /// # Errors
    ///
    /// The disk cannot be written.
    pub fn write(&self, content: &[u8], offset_bytes: u64) -> Result<()> {
        let file = File::options().write(true).open(&self.path).context("cannot open the disk")?;
        file.write_all_at(content, offset_bytes).context("cannot write the disk")?;
        // The broker may use direct I/O.
        file.sync_all().context("cannot write the disk")
    }

    /// Gives the disk, which is a file, another size, and tells the broker.
    ///
    /// # Errors
    ///
    /// The file cannot be changed, or the broker has ended.
    pub fn resize(&mut self, size_bytes: u64) -> Result<()> {
        let file = File::options().write(true).open(&self.path).context("cannot open the disk")?;
        file.set_len(size_bytes).context("cannot change the size of the disk")?;
        self.broker.signal(Signal::HUP)
    }

    /// The guest's device for this disk.
    pub fn device(&self) -> VhostUserDisk {
        self.device_called("disk")
    }

    /// The guest's device for this disk, with this id for QEMU.
    pub fn device_called(&self, id: &str) -> VhostUserDisk {
        let properties = vec!["config-wce=on".to_owned()];
        VhostUserDisk {
            queues: self.serving.queues,
            reconnect: true,
            properties,
            ..VhostUserDisk::new(id, self.broker.socket())
        }
    }

    /// Boots a guest with the driver, and waits until its queues have rings. `config` has the rest.
    ///
    /// # Errors
    ///
    /// The driver cannot be built, the guest does not boot, or it gets no rings.
    pub fn boot(&self, config: LinuxGuestConfig) -> Result<LinuxGuest> {
        let driver = BlockDriver::of(config.kernel)?;
        let config = LinuxGuestConfig { disks: vec![self.device()], block_driver: Some(driver), ..config };
        let mut guest = self.broker.explain(LinuxGuest::boot(&config))?;
        self.broker.explain(guest.run(AWAIT_RINGS))?;
        Ok(guest)
    }

    /// Changes the broker's mode as an operator does.
    ///
    /// # Errors
    ///
    /// The broker refuses.
    pub fn set_mode(&self, mode: &str) -> Result<()> {
        let mut command = Command::new(broker_process::program()?);
        command.args(["dev", "set", "broker", "mode", mode]).env("RUNTIME_DIRECTORY", self.directory.path());
        let output = command.output().context("cannot start the program")?;
        ensure!(output.status.success(), "mode {mode}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Ends the broker, and checks that it ends with success.
    ///
    /// # Errors
    ///
    /// It does not.
    pub fn end(mut self) -> Result<()> {
        let status = self.broker.terminate()?;
        ensure!(status.success(), "the broker: {status}\n{}", self.broker.log());
        Ok(())
    }
}

fn socket(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("broker.sock")
}

/// Sums a statistic of the driver over all queues of `/dev/vda`.
///
/// # Errors
///
/// The guest has no such statistic.
pub fn statistic(guest: &mut LinuxGuest, name: &str) -> Result<u64> {
    let lines = guest.run(&format!("cat /sys/block/vda/ringpass/queue*/{name}"))?;
    lines.lines().map(|line| line.parse::<u64>().context("a number")).sum()
}

/// The ways that requests of a disk have taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ways {
    /// Requests over rings.
    pub ring: u64,
    /// Their SQEs.
    pub sqes: u64,
    /// Requests over virtqueues.
    pub virtqueue: u64,
}

impl Ways {
    /// The ways that requests of a disk have taken since the driver has it.
    ///
    /// # Errors
    ///
    /// The guest has no such disk.
    pub fn of(guest: &mut LinuxGuest, disk: &str) -> Result<Self> {
        let lines = guest.run(&format!(
            "cd /sys/block/{disk}/ringpass
            for name in ring_requests ring_sqes virtqueue_requests; do echo $(cat queue*/$name); done"
        ))?;
        let sum = |line: &str| line.split(' ').map(|number| number.parse::<u64>().context("a number")).sum();
        let sums = lines.lines().map(sum).collect::<Result<Vec<u64>>>()?;
        let [ring, sqes, virtqueue] = sums[..] else { bail!("not three lines: {lines}") };
        Ok(Self { ring, sqes, virtqueue })
    }

    /// Waits until a load has sent enough requests from now on.
    ///
    /// # Errors
    ///
    /// They do not come in time, or the guest has no such disk.
    pub fn await_more(guest: &mut LinuxGuest, disk: &str, is_enough: impl Fn(Self) -> bool) -> Result<Self> {
        let before = Self::of(guest, disk)?;
        let end = Instant::now() + LOAD_LIMIT;
        loop {
            let more = Self::of(guest, disk)?.since(before);
            if is_enough(more) {
                return Ok(more);
            }
            ensure!(Instant::now() < end, "requests of the load: {more:?}");
            guest.let_run(Duration::from_millis(20))?;
        }
    }

    /// What requests of a disk do during some work.
    ///
    /// # Errors
    ///
    /// The work fails, or the guest has no such disk.
    pub fn during(
        guest: &mut LinuxGuest,
        disk: &str,
        work: impl FnOnce(&mut LinuxGuest) -> Result<()>,
    ) -> Result<Self> {
        let before = Self::of(guest, disk)?;
        work(guest)?;
        Ok(Self::of(guest, disk)?.since(before))
    }

    fn since(self, before: Self) -> Self {
        Self {
            ring: self.ring - before.ring,
            sqes: self.sqes - before.sqes,
            virtqueue: self.virtqueue - before.virtqueue,
        }
    }
}
