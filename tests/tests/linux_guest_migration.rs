//! Live migration of a guest to a second QEMU, with a second broker on the same disk.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use ringpass_tests::broker_process::{self, BrokerProcess};
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::forgetful_proxy::ForgetfulProxy;
use ringpass_tests::harness::{self, test};
use ringpass_tests::linux_guest::{
    self, IncomingGuest, Job, JobOutput, LinuxGuest, LinuxGuestConfig, Migration, VhostUserDisk, cached, fio, memory,
};
use ringpass_tests::needs::Need;

const DISK_BYTES: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    harness::run(vec![
        test("a_guest_migrates_to_another_broker_under_load_with_every_page", needs(), migration),
        test("the_test_finds_a_migration_without_a_dirty_log", needs(), control),
    ])
}

fn needs() -> Vec<Need> {
    [linux_guest::needs(), broker_process::needs(), DiskKind::Ext4Direct.needs()].into_iter().flatten().collect()
}

/// Two sockets, and brokers of one disk.
struct Brokers {
    disk: TestDisk,
    directory: tempfile::TempDir,
    source: BrokerProcess,
    target: BrokerProcess,
}

impl Brokers {
    fn start() -> Result<Self> {
        let disk = TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?;
        let directory = tempfile::tempdir().context("cannot make a directory for sockets")?;
        let source = directory.path().join("source.sock");
        let target = directory.path().join("target.sock");
        let source = BrokerProcess::start(&source, disk.path(), &["--num-queues", "2"])?;
        let target = BrokerProcess::start(&target, disk.path(), &["--num-queues", "2", "--incoming"])?;
        Ok(Self { disk, directory, source, target })
    }

    fn explain<T>(&self, result: Result<T>) -> Result<T> {
        let result =
            result.map_err(|error| anyhow::anyhow!("{error:#}\nthe target broker's log:\n{}", self.target.log()));
        self.source.explain(result)
    }
}

fn config(socket: PathBuf) -> LinuxGuestConfig {
    LinuxGuestConfig {
        memory_mib: 256,
        cpus: 1,
        disks: vec![VhostUserDisk::new("disk", &socket)],
        // With this, only the device writes to pages of the page cache.
        kernel_arguments: vec!["init_on_alloc=0".to_owned()],
        ..LinuxGuestConfig::default()
    }
}

/// Starts a migration. When QEMU has sent nearly all memory, the guest reads the blocks that it checks later. Most of
/// them, and at least 24 of 32 MiB, come to pages that QEMU has sent. Returns the job that changes memory too.
fn begin(mut guest: LinuxGuest, target: IncomingGuest) -> Result<(Migration, Job)> {
    guest.run(cached::FILL)?;
    guest.spawn(cached::HOLD)?;
    let changes = guest.spawn(memory::CHANGE_AND_VERIFY)?;
    guest.wait_for_text(changes, "begins", LIMIT)?;
    let mut migration = guest.migrate_to(target, LIMIT)?;
    migration.hold_near_the_end(LIMIT)?;
    migration.source().run(cached::READ)?;
    Ok((migration, changes))
}

fn migration() -> Result<()> {
    let brokers = Brokers::start()?;
    let mut guest = brokers.explain(LinuxGuest::boot(&config(brokers.source.socket().to_owned())))?;
    let target = brokers.explain(IncomingGuest::start(&config(brokers.target.socket().to_owned())))?;
    // fio must not empty the page cache at the start of each run.
    let options = "--rw=randwrite --bsrange=4k-64k --offset=32m --size=4m --iodepth=4 --rate=2m --invalidate=0";
    let load = guest.spawn(&fio::verify_until_stopped("libaio", "/dev/vda", options))?;

    let (migration, changes) = brokers.explain(begin(guest, target))?;
    let mut guest = brokers.explain(migration.finish(LIMIT))?;

    guest.run(memory::STOP)?;
    brokers.explain(guest.wait(changes, LIMIT))?;
    guest.run(fio::STOP)?;
    let said = brokers.explain(guest.wait(load, LIMIT))?;
    ensure!(said.contains("is verified"), "{said}");
    let looked = brokers.explain(guest.run(cached::LOOK))?;
    ensure!(looked == "0 sectors were read\n", "the guest did not look at its page cache: {looked}");
    // The first broker has released the disk and serves no front-end.
    guest.run(&fio::verify("psync", "/dev/vda", "--rw=randrw --bs=4k --offset=48m --size=2m"))?;
    guest.shut_down()?;
    let Brokers { mut source, mut target, .. } = brokers;
    ensure!(source.terminate()?.success() && target.terminate()?.success(), "{}\n{}", source.log(), target.log());
    Ok(())
}

fn control() -> Result<()> {
    let mut brokers = Brokers::start()?;
    let socket = brokers.directory.path().join("proxy.sock");
    let proxy = ForgetfulProxy::start(&socket, brokers.source.socket())?;
    let guest = brokers.explain(LinuxGuest::boot(&config(socket)))?;
    let target = brokers.explain(IncomingGuest::start(&config(brokers.target.socket().to_owned())))?;
    let (migration, _) = brokers.explain(begin(guest, target))?;
    let guest = migration.finish(LIMIT);
    // The source broker does not know of the migration, and so keeps the disk.
    proxy.wait()?;
    brokers.source.kill()?;
    let mut guest = brokers.explain(guest)?;

    let found = find_out(&mut guest)?;
    eprintln!("found out: {}", found.lines().next().unwrap_or("?"));
    drop(brokers.disk);
    Ok(())
}

/// Returns the text that shows that the migration missed pages which the device wrote.
///
/// # Errors
///
/// Nothing shows it, or the look at the guest failed for another reason.
fn find_out(guest: &mut LinuxGuest) -> Result<String> {
    let look = guest.spawn(cached::LOOK)?;
    match guest.wait_output(look, LIMIT) {
        Ok(JobOutput { status: 0, text }) => bail!("nothing is wrong with the page cache: {text}"),
        // fio prints this word for a block with a wrong checksum.
        Ok(JobOutput { text, .. }) if text.contains("verify") => Ok(text),
        Ok(JobOutput { status, text }) => bail!("the look failed with status {status} for another reason: {text}"),
        // The migration misses pages of the vrings too. The driver then waits for a request that has ended, or finds a
        // used ring that makes no sense. The rest of the guest must work.
        Err(error) => {
            let alive =
                guest.run("echo alive").with_context(|| format!("not even the agent answers, after: {error:#}"))?;
            ensure!(alive == "alive\n", "the agent says {alive:?} after: {error:#}");
            Ok("the guest's disk does not answer, and its agent does".to_owned())
        }
    }
}
