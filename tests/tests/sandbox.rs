//! A serving broker is confined, with and without rings, and works. The systemd unit confines it too.

use std::{
    fs,
    os::unix::{fs::chown, process::CommandExt},
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_guest_abi::request::ErrorCode;
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::{
        attach::{
            bench::{Bench, start_queue_zero, start_ring},
            wait_until, whole,
        },
        blk::SECTOR_BYTES,
        descriptor::Descriptor,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
    },
    harness::{self, test},
    needs::Need,
};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN};

const DISK_BYTES: u64 = 4 << 20;
/// `CAP_IPC_LOCK` (`<linux/capability.h>`), which a broker of root keeps if it cannot raise RLIMIT_MEMLOCK.
const IPC_LOCK: u64 = 1 << 14;
/// The unit's score in `systemd-analyze security`, rounded up. What is left: block devices, and namespaces that the
/// server makes.
const EXPOSURE_MAX: f64 = 2.0;
/// `O_CLOEXEC` as `/proc/PID/fdinfo` has it.
const CLOEXEC: u32 = 0o2_000_000;
/// The user `nobody`, and its group. A server of this user gets no user namespace.
const NOBODY: u32 = 65534;
/// A user that the machine does not know.
const USER: u32 = 1_234_570;

fn main() -> ExitCode {
    let needs = |more: Vec<Need>| {
        let kind = DiskKind::Ext4PageCache.needs().into_iter();
        kind.chain(broker_process::needs()).chain(more).collect::<Vec<Need>>()
    };
    harness::run(vec![
        test("every_thread_is_filtered_without_privileges_and_no_file_survives_an_exec", needs(vec![]), confined),
        test("a_broker_without_a_sandbox_says_so_and_has_what_its_user_has", needs(vec![]), not_confined),
        test("a_broker_of_an_ordinary_user_serves_and_says_what_rings_lack", needs(vec![Need::root()]), ordinary_user),
        test(
            "systemd_understands_every_line_of_the_unit",
            vec![Need::program("systemd-analyze", "systemd")],
            systemd_unit,
        ),
    ])
}

fn confined() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 3, &[])?;
    let mut driver = bench.attached(1)?;
    driver.write(0, &[0x5a; 4096])?;
    let mut threads = Vec::new();
    for process in bench.broker.processes().map(|pid| format!("/proc/{pid}")) {
        for task in fs::read_dir(format!("{process}/task"))? {
            let Ok(status) = fs::read_to_string(task?.path().join("status")) else { continue };
            let name = field(&status, "Name")?;
            for set in ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"] {
                let set_bits = u64::from_str_radix(field(&status, set)?, 16)?;
                ensure!(set_bits & !IPC_LOCK == 0, "{set} of thread {name}: {set_bits:#x}");
            }
            ensure!(field(&status, "NoNewPrivs")? == "1", "thread {name}");
            ensure!(field(&status, "Seccomp")? == "2", "thread {name} is not filtered");
            threads.push(name.to_owned());
        }
        let (files, kept) = (fs::read_dir(format!("{process}/fdinfo"))?.count(), files_over_exec(&process)?);
        if let Some(number) = kept.first() {
            let link = fs::read_link(format!("{process}/fd/{number}"));
            bail!("descriptor {number}, {link:?}, would stay open over an exec");
        }
        ensure!(files > 10, "only {files} files");
    }
    // The SQ thread belongs to the kernel and has the credentials of the ring's creator.
    ensure!(threads.iter().any(|name| name.starts_with("iou-sqp")), "no SQ thread among {threads:?}");
    eprintln!("threads: {}", threads.join(", "));
    driver.read(0, 4096).map(drop)
}

fn not_confined() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--sandbox", "off"])?;
    broker.wait_for_log("WARN ringpass::serve::sandbox: server not confined (--sandbox off)")?;
    let status = fs::read_to_string(format!("/proc/{}/status", broker.pid()))?;
    ensure!(field(&status, "Seccomp")? == "0" && field(&status, "NoNewPrivs")? == "0");
    let own = fs::read_to_string("/proc/self/status")?;
    ensure!(field(&status, "CapEff")? == field(&own, "CapEff")?);
    Ok(())
}

fn ordinary_user() -> Result<()> {
    for user in [NOBODY, USER] {
        serves_and_says(user).with_context(|| format!("user {user}"))?;
    }
    Ok(())
}

fn serves_and_says(user: u32) -> Result<()> {
    let directory = tempfile::Builder::new().prefix("ringpass-nobody-").tempdir_in("/tmp")?;
    let path = |name: &str| directory.path().join(name);
    let program = path("ringpass");
    fs::copy(broker_process::program()?, &program)?;
    fs::File::create_new(path("disk.img"))?.set_len(DISK_BYTES)?;
    for path in [directory.path(), &path("disk.img")] {
        chown(path, Some(user), Some(user))?;
    }
    let broker = BrokerProcess::spawn(serve_as(user, &program, directory.path()), &path("s"))?;
    broker.explain((|| {
        broker.wait_for_log("waiting for a front-end")?;
        let mut ram = TestRam::new(1, 16 << 20)?;
        let front_end = FrontEnd::connect(broker.socket(), &ram.ram, Options::default())?;
        let _queue_zero = start_queue_zero(&front_end, &mut ram)?;
        let mut driver = start_ring(&front_end, &mut ram, 1)?;
        driver.send_both(&driver.payload().to_bytes())?;
        let found = driver.wait_attach()?;
        ensure!(found == whole(ErrorCode::Resources), "ATTACH: {found:?}");
        broker.wait_for_log("pinning needs 16 MiB, RLIMIT_MEMLOCK is 8 MiB")?;
        broker.wait_for_log("LimitMEMLOCK=")?;
        // The queue is still a virtqueue.
        let used = driver.vring().used_idx()?;
        let data = Descriptor::writable(driver.buffers().at(0), 4096);
        driver.send_block(VIRTIO_BLK_T_IN, DISK_BYTES / SECTOR_BYTES - 8, data)?;
        wait_until("a read", || Ok(driver.vring().used_idx()? != used))?;
        ensure!(u32::from(driver.block_status()?) == VIRTIO_BLK_S_OK);
        Ok(())
    })())
}

/// The test does not run systemd, which would have to be the first process.
fn systemd_unit() -> Result<()> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ringpass/share/systemd/ringpass@.service");
    let unit = fs::read_to_string(&unit).with_context(|| unit.display().to_string())?;
    // The program is not installed.
    let unit = unit.replace("/usr/bin/ringpass", "/bin/true");
    verify(&unit)?;
    let exposure = exposure(&unit)?;
    eprintln!("exposure {exposure}");
    ensure!(exposure <= EXPOSURE_MAX, "an exposure of {exposure}");
    ensure!(
        verify(&unit.replace("NoNewPrivileges=yes", "NoNewPrivilege=yes")).is_err(),
        "systemd-analyze accepts a misspelled setting"
    );
    Ok(())
}

fn verify(unit: &str) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("ringpass@vm1.service");
    fs::write(&path, unit)?;
    let output =
        Command::new("systemd-analyze").args(["verify", "--man=no", "--recursive-errors=no"]).arg(path).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && errors.is_empty(), "{errors}");
    Ok(())
}

/// How much `systemd-analyze security` finds open in a unit, from 0 to 10.
fn exposure(unit: &str) -> Result<f64> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("ringpass@vm1.service");
    fs::write(&path, unit)?;
    let output = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--no-pager"])
        .arg(&path)
        .env("LC_ALL", "C")
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.contains("Overall exposure level"));
    let number = line.and_then(|line| line.split(": ").nth(1)?.split_whitespace().next()?.parse().ok());
    number.with_context(|| format!("no exposure in {text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// The command of a broker of an ordinary user, who may pin 8 MiB.
fn serve_as(user: u32, program: &Path, directory: &Path) -> Command {
    let mut command = Command::new("prlimit");
    command.arg("--memlock=8388608:8388608").arg(program).args(["serve", "--socket-path"]);
    command.arg(directory.join("s")).arg("--blk-file").arg(directory.join("disk.img"));
    command.args(["--control-socket", "none", "--mode", "direct"]);
    command.uid(user).gid(user);
    command
}

/// The descriptors that an executed program would inherit.
fn files_over_exec(process: &str) -> Result<Vec<String>> {
    let mut numbers = Vec::new();
    for file in fs::read_dir(format!("{process}/fdinfo"))? {
        let file = file?;
        // The broker has closed the file meanwhile.
        let Ok(info) = fs::read_to_string(file.path()) else { continue };
        if u32::from_str_radix(field(&info, "flags")?, 8)? & CLOEXEC == 0 {
            numbers.push(file.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(numbers)
}

fn field<'a>(status: &'a str, name: &str) -> Result<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.map(str::trim).with_context(|| format!("no {name} in {status}"))
}
