//! What the repository's Linux driver does with the memory of its rings when the server is dead and cannot give them back.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kernel_log;
use ringpass_tests::linux_guest::{
    LinuxGuestConfig, fio,
    on_rings::{AWAIT_RINGS, ServedDisk, needs, statistic},
};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    harness::run(vec![test(
        "the_memory_of_a_dead_servers_rings_is_free_again_when_the_next_server_has_answered",
        needs(),
        dead_server,
    )])
}

fn dead_server() -> Result<()> {
    let mut served = ServedDisk::new()?;
    let block_driver_parameters = "detach_seconds=1".to_owned();
    let mut guest = served.boot(LinuxGuestConfig { block_driver_parameters, ..LinuxGuestConfig::default() })?;
    let verify = fio::verify("libaio", "/dev/vda", "--rw=randwrite --bs=4k --size=2m --iodepth=16");
    guest.run(&verify)?;
    ensure!(statistic(&mut guest, "quarantined_bytes")? == 0);

    // The driver is removed.
    served.broker.kill()?;
    guest.run("rmmod ringpass_blk")?;
    let log = guest.run("dmesg -c | grep ringpass_blk")?;
    ensure!(log.matches("bytes stay reserved").count() == 2, "{log}");
    served.start_again()?;
    guest.run("load-module ringpass_blk detach_seconds=1")?;
    served.broker.explain(guest.run(AWAIT_RINGS))?;
    served.broker.explain(guest.run(&verify))?;

    // The guest is suspended.
    served.broker.kill()?;
    let job = guest.spawn("echo mem >/sys/power/state")?;
    let end = Instant::now() + LIMIT;
    while guest.qmp(json!({"execute": "query-status"}))?["status"] != "suspended" {
        ensure!(Instant::now() < end, "the guest is not suspended");
        guest.let_run(Duration::from_millis(50))?;
    }
    guest.qmp(json!({"execute": "system_wakeup"}))?;
    guest.wait(job, LIMIT)?;
    let bytes = statistic(&mut guest, "quarantined_bytes")?;
    ensure!(bytes > 0, "nothing is in quarantine while no server has answered");
    served.start_again()?;
    served.broker.explain(guest.run(AWAIT_RINGS))?;
    let left =
        "until [ \"$(cat /sys/block/vda/ringpass/queue*/quarantined_bytes | sort -u)\" = 0 ]; do usleep 20000; done";
    served.broker.explain(guest.run(left))?;
    served.broker.explain(guest.run(&verify))?;
    eprintln!("{bytes} bytes were in quarantine");
    // Whatever the driver, this guest cannot be switched off any more after that.
    let console = guest.console();
    ensure!(!console.lines().any(kernel_log::is_trouble), "{console}");
    drop(guest);
    served.end()
}
