//! Live migration of a guest to a second QEMU on the same machine.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{LinuxGuest, LinuxGuestConfig, accelerator, config::Start, image::GuestImage, machine::Machine};

/// The rest of the memory at which the migration slows down: a busy machine notices it in time, and the slow migration
/// sends it in a few seconds.
const LITTLE_BYTES: u64 = 24 << 20;

/// A QEMU that waits for a guest. It has the same devices as the guest's QEMU, with other back-ends.
#[derive(Debug)]
pub struct IncomingGuest {
    machine: Machine,
}

impl IncomingGuest {
    /// Starts a QEMU that waits.
    ///
    /// # Errors
    ///
    /// QEMU does not start.
    pub fn start(config: &LinuxGuestConfig) -> Result<Self> {
        let image = GuestImage::of(config.kernel)?;
        let accelerator = accelerator(&image)?;
        let machine = Machine::start(config, &Start::Incoming(&image), accelerator)?;
        Ok(Self { machine })
    }
}

/// A running migration. The guest runs in the first QEMU or already in the second.
#[derive(Debug)]
pub struct Migration {
    source: LinuxGuest,
    target: IncomingGuest,
}

impl LinuxGuest {
    /// Starts to migrate the guest, with this bandwidth and at most this time in which no guest runs.
    ///
    /// # Errors
    ///
    /// A QEMU refuses, for example because a back-end cannot log its writes.
    pub fn migrate_to(
        mut self,
        mut target: IncomingGuest,
        bandwidth_bytes_per_s: u64,
        downtime: Duration,
    ) -> Result<Migration> {
        let uri = format!("unix:{}", target.machine.directory().join("migration").display());
        target.machine.qmp.execute(json!({"execute": "migrate-incoming", "arguments": {"uri": uri}}))?;
        set_parameters(&mut self, bandwidth_bytes_per_s, downtime)?;
        self.qmp(json!({"execute": "migrate", "arguments": {"uri": uri}}))?;
        Ok(Migration { source: self, target })
    }
}

impl Migration {
    /// The guest in the first QEMU. It runs there until the migration is [finished](Self::finish).
    pub fn source(&mut self) -> &mut LinuxGuest {
        &mut self.source
    }

    /// Changes bandwidth and downtime.
    ///
    /// # Errors
    ///
    /// QEMU refuses.
    pub fn set_parameters(&mut self, bandwidth_bytes_per_s: u64, downtime: Duration) -> Result<()> {
        set_parameters(&mut self.source, bandwidth_bytes_per_s, downtime)
    }

    /// Waits until QEMU has sent all memory once and only sends changes. Before that, when little memory remains, slows
    /// the migration down to this many bytes per second, so that it does not end even if the guest does not run for a
    /// while.
    ///
    /// # Errors
    ///
    /// The migration fails or ends before, or this takes longer than the limit.
    pub fn crawl_into_second_pass(&mut self, bandwidth_bytes_per_s: u64, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let mut is_slow = false;
        loop {
            let state = self.state()?;
            // The first synchronisation is at the start. The second one begins the second pass.
            if state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0) >= 2 && state["status"] == "active" {
                return Ok(());
            }
            let remaining_bytes = state["ram"]["remaining"].as_u64().unwrap_or(u64::MAX);
            if !is_slow && remaining_bytes < LITTLE_BYTES {
                self.set_parameters(bandwidth_bytes_per_s, Duration::from_millis(1))?;
                is_slow = true;
            }
            ensure!(state["status"] != "completed", "the migration has ended before its second pass");
            ensure!(Instant::now() < end, "no second pass after {limit:?}: {state}");
            self.source.let_run(Duration::from_millis(20))?;
        }
    }

    /// Waits for the end, and continues with the guest in the second QEMU. Its scripts continue too.
    ///
    /// # Errors
    ///
    /// The migration fails, or takes longer than the limit.
    pub fn finish(mut self, limit: Duration) -> Result<LinuxGuest> {
        let end = Instant::now() + limit;
        let state = loop {
            let state = self.state()?;
            if state["status"] == "completed" {
                break state;
            }
            ensure!(Instant::now() < end, "the migration takes longer than {limit:?}: {state}");
            // The source's serial port may be full. The guest may already have stopped.
            self.source.machine.agent.pump(Duration::from_millis(20))?;
        };
        eprintln!(
            "migrated {} MiB in {} ms, {} passes, {} ms without a guest",
            state["ram"]["transferred"].as_u64().unwrap_or(0) >> 20,
            state["total-time"],
            state["ram"]["dirty-sync-count"],
            state["downtime"],
        );
        let Self { mut source, mut target } = self;
        source.qmp(json!({"execute": "quit"}))?;
        source.machine.wait_end(Duration::from_secs(30))?;
        let running_limit = Instant::now() + Duration::from_secs(30);
        loop {
            let status = target.machine.qmp.execute(json!({"execute": "query-status"}))?;
            if status["status"] == "running" {
                break;
            }
            ensure!(Instant::now() < running_limit, "the guest does not run after its migration: {status}");
            thread::sleep(Duration::from_millis(5));
        }
        target.machine.go_on_from(source.machine).context("cannot go on with the serial port of the second QEMU")?;
        Ok(LinuxGuest { machine: target.machine })
    }

    fn state(&mut self) -> Result<Value> {
        let state = self.source.qmp(json!({"execute": "query-migrate"}))?;
        match state["status"].as_str() {
            Some("failed" | "cancelled") => bail!(
                "the migration has failed: {state}\nfrom:\n{}\nto:\n{}",
                self.source.machine.describe(),
                self.target.machine.describe()
            ),
            _ => Ok(state),
        }
    }
}

fn set_parameters(guest: &mut LinuxGuest, bandwidth_bytes_per_s: u64, downtime: Duration) -> Result<()> {
    let arguments = json!({"max-bandwidth": bandwidth_bytes_per_s, "downtime-limit": downtime.as_millis() as u64});
    guest.qmp(json!({"execute": "migrate-set-parameters", "arguments": arguments})).map(drop)
}
