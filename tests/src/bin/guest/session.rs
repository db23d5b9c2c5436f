//! One guest with its broker, from the first look at the options to the end of both.

use std::{
    fs,
    io::{IsTerminal, Write, stderr, stdin, stdout},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::{DiskKind, TestDisk},
    interruption,
    linux_guest::{self, BlockDriver, GuestImage, LinuxGuest, LinuxGuestConfig, VhostUserDisk},
};

use crate::options::{Kernel, Options};

/// The size of the disk that vanishes with the guest.
const DISK_BYTES: u64 = 128 << 20;
/// How long the program waits between two looks at a script.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How long an ended script's last output may take.
const END_LIMIT: Duration = Duration::from_secs(10);

const DEMONSTRATION: &str = include_str!("demonstration.sh");
/// A program of the guest.
const RINGS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bin/guest/rings");
/// A script that waits until every queue that can have a ring has one, or the time is up. It prints the modes.
const AWAIT_RINGS: &str = "tries=0
    while modes=$(cat /sys/block/vda/ringpass/queue[1-9]*/mode 2>/dev/null | sort -u); [ \"$modes\" != ring ]; do
        tries=$((tries + 1))
        [ $tries = 500 ] && break
        usleep 20000
    done
    echo $modes";

/// What runs in the guest.
enum Work {
    Shell,
    Script(String),
}

/// Runs a guest to its end, and returns the exit status of its script.
pub(crate) fn run(options: &Options) -> Result<u8> {
    options.check()?;
    let work = work(options)?;
    check_needs(options)?;
    let progress = Progress::begin();

    let built = tempfile::tempdir().context("cannot make a directory for the driver")?;
    progress.tell("the kernel, the guest's programs and the driver");
    GuestImage::of(options.kernel.series())?;
    let driver = driver(options, built.path())?;

    let disk = Disk::new(options.disk.as_deref())?;
    let directory = tempfile::tempdir().context("cannot make a directory for sockets")?;
    progress.tell(&format!("ringpass serve, for {}", disk.name()));
    let queues = options.queues().to_string();
    let arguments = ["--num-queues", &queues, "--mode", &options.mode];
    let mut broker = BrokerProcess::start(&directory.path().join("broker.sock"), disk.path(), &arguments)?;

    progress.tell(&format!("QEMU, {} CPUs, {} MiB", options.cpus, options.memory_mib));
    let mut guest = broker.explain(boot(options, driver, &broker))?;
    if options.mode != "virtqueue" {
        progress.tell("rings for the queues");
        await_rings(&mut guest, directory.path())?;
    }
    let status = match work {
        Work::Shell => {
            eprintln!(
                "==> a shell in the guest: the disk is /dev/vda, `rings` shows its queues; `exit` ends the guest (or \
                 Ctrl-A X)\n"
            );
            guest.shell()?;
            0
        }
        Work::Script(script) => {
            progress.tell("the script");
            let status = run_script(&mut guest, &script)?;
            guest.shut_down()?;
            status
        }
    };
    let ended = broker.terminate()?;
    ensure!(ended.success(), "ringpass serve: {ended}\n{}", broker.log());
    progress.tell("everything has ended");
    Ok(status)
}

fn work(options: &Options) -> Result<Work> {
    if options.shell {
        ensure!(
            stdin().is_terminal() && stdout().is_terminal(),
            "--shell needs a terminal: use --script FILE without one"
        );
        return Ok(Work::Shell);
    }
    let Some(path) = &options.script else { return Ok(Work::Script(DEMONSTRATION.to_owned())) };
    let script = fs::read_to_string(path).with_context(|| format!("cannot read the script {}", path.display()))?;
    Ok(Work::Script(script))
}

/// Everything that is missing, at once.
fn check_needs(options: &Options) -> Result<()> {
    let mut needs = linux_guest::needs();
    needs.extend(broker_process::needs());
    if let Kernel::Debian(series) = options.kernel {
        needs.extend(BlockDriver::needs(series));
    }
    if options.disk.is_none() {
        needs.extend(DiskKind::Ext4Direct.needs());
    }
    let missing: Vec<String> =
        needs.iter().filter_map(|need| need.check().err()).map(|error| error.to_string()).collect();
    ensure!(missing.is_empty(), "{}", missing.join("\n  "));
    Ok(())
}

fn driver(options: &Options, built: &Path) -> Result<BlockDriver> {
    match (&options.kernel, &options.headers) {
        (Kernel::Image(_), Some(headers)) => {
            // The compiler runs in another directory.
            let headers = fs::canonicalize(headers).with_context(|| format!("cannot enter {}", headers.display()))?;
            BlockDriver::with_headers(&headers, built)
        }
        _ => BlockDriver::of(options.kernel.series()),
    }
}

fn boot(options: &Options, driver: BlockDriver, broker: &BrokerProcess) -> Result<LinuxGuest> {
    let disk = VhostUserDisk {
        queues: options.queues(),
        reconnect: true,
        properties: vec!["config-wce=on".to_owned()],
        ..VhostUserDisk::new("disk", broker.socket())
    };
    let image = match &options.kernel {
        Kernel::Image(path) => Some(path.clone()),
        Kernel::Debian(_) => None,
    };
    LinuxGuest::boot(&LinuxGuestConfig {
        kernel: options.kernel.series(),
        kernel_image: image,
        cpus: options.cpus,
        memory_mib: options.memory_mib,
        disks: vec![disk],
        block_driver: Some(driver),
        programs: vec![PathBuf::from(RINGS)],
        ..LinuxGuestConfig::default()
    })
}

/// Waits for the rings. A disk without rings is still a disk, so the guest goes on; this tells why there are none.
fn await_rings(guest: &mut LinuxGuest, sockets: &Path) -> Result<()> {
    let modes = guest.run(AWAIT_RINGS)?;
    if modes.trim() == "ring" {
        return Ok(());
    }
    let said = guest.run("dmesg | grep 'ringpass_blk.*: ' | tail -n 5; [ -e /dev/vda ]; echo $?")?;
    let (said, disk) = said.trim_end().rsplit_once('\n').unwrap_or(("", said.trim_end()));
    ensure!(
        disk == "0",
        "the guest has no /dev/vda: its kernel does not load the driver, or has no virtio_pci built in\n{said}"
    );
    let output = Command::new(broker_process::program()?)
        .args(["dev", "show"])
        .env("RUNTIME_DIRECTORY", sockets)
        .output()
        .context("cannot start the program")?;
    eprintln!(
        "\nNot all queues have rings, so requests go over virtqueues (`target/debug/ringpass probe` tells what this machine \
         allows, --mode direct offers rings on other kernels too).\nThe driver says:\n{said}\nThe server says:\n{}\n",
        String::from_utf8_lossy(&output.stdout).trim_end(),
    );
    Ok(())
}

/// Runs a script, and shows its output as it comes.
fn run_script(guest: &mut LinuxGuest, script: &str) -> Result<u8> {
    let job = guest.spawn(script)?;
    let mut shown = 0;
    let mut show = |text: &str| -> Result<()> {
        let mut out = stdout().lock();
        let new = text.get(shown..).unwrap_or_default();
        out.write_all(new.as_bytes()).and_then(|()| out.flush()).context("cannot write the output of the script")?;
        shown = text.len();
        Ok(())
    };
    while !guest.has_ended(job)? {
        interruption::check()?;
        show(guest.output_so_far(job))?;
        guest.let_run(LOOK_INTERVAL)?;
    }
    let output = guest.wait_output(job, END_LIMIT).context("the guest has restarted")?;
    show(&output.text)?;
    Ok(u8::try_from(output.status).unwrap_or(u8::MAX))
}

/// The disk of the guest.
enum Disk {
    /// The user's.
    Named(PathBuf),
    Temporary(TestDisk),
}

impl Disk {
    fn new(named: Option<&Path>) -> Result<Self> {
        Ok(match named {
            Some(path) => Self::Named(std::path::absolute(path).context("cannot resolve the path of the disk")?),
            None => Self::Temporary(TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?),
        })
    }

    fn path(&self) -> &Path {
        match self {
            Self::Named(path) => path,
            Self::Temporary(disk) => disk.path(),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Named(path) => path.display().to_string(),
            Self::Temporary(_) => format!("a temporary image of {} MiB", DISK_BYTES >> 20),
        }
    }
}

/// Tells on stderr what the program does, and when. The output of a script has stdout for itself.
struct Progress {
    start: Instant,
}

impl Progress {
    fn begin() -> Self {
        Self { start: Instant::now() }
    }

    fn tell(&self, what: &str) {
        let line = format!("==> {:5.1} s  {what}", self.start.elapsed().as_secs_f64());
        let _ = writeln!(stderr(), "{line}");
    }
}
