//! Live migration of a guest to a second QEMU on the same machine.
//!
//! An emulated CPU (TCG) writes through entries of a TLB. An entry that QEMU has marked as dirty bypasses the dirty
//! bitmap. QEMU before 9.0 takes bits out of the bitmap and leaves such entries as they are
//! (`cpu_physical_memory_sync_dirty_bitmap`): until the guest's next change of CR3 flushes the TLB, the migration misses
//! what the CPU stores to pages that QEMU has just sent, and the guest dies at the target. (Later versions mark the
//! entries, and still lose stores if `notdirty_write` is interrupted between its check and `tlb_set_dirty`.) Real-time
//! priority of QEMU's threads does not help. So a migration sends no page between a synchronisation of the bitmap and
//! the next flush of the TLB:
//!
//! * After the first synchronisation, at its start, QEMU sends nothing until a script has run in the guest.
//! * QEMU is held before it has sent all memory once, and so does not synchronise again.
//! * At the end any rest is small enough for QEMU to stop the guest: it synchronises, and sends pages again only when the
//!   guest has stopped.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{LinuxGuest, LinuxGuestConfig, accelerator, config::Start, image::GuestImage, machine::Machine};

/// The bandwidth at which QEMU sends no page. It divides it among tenths of a second, and each time the header before
/// the pages is longer than this.
const HELD_BYTES_PER_S: u64 = 10;
/// The bandwidth until little memory remains.
const WALK_BYTES_PER_S: u64 = 32 << 20;
/// The bandwidth from then on.
const CRAWL_BYTES_PER_S: u64 = 4 << 20;
/// The rest of the memory at which the migration slows down: a busy machine notices it in time.
const LITTLE_BYTES: u64 = 24 << 20;
/// The rest of the memory at which [`Migration::hold_near_the_end`] stops the migration. The end takes one or two tenths
/// of a second at [`CRAWL_BYTES_PER_S`], and must not send all of it.
const REST_BYTES: u64 = 8 << 20;
/// QEMU stops the guest only when it can send the rest in this time. So it does not before the end.
const NO_DOWNTIME: Duration = Duration::from_millis(1);
/// The longest time that QEMU accepts. In it a crawling migration sends much more than the memory of any guest.
const ANY_DOWNTIME: Duration = Duration::from_secs(2000);

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
    /// Starts to migrate the guest, which has one CPU.
    ///
    /// # Errors
    ///
    /// A QEMU refuses, for example because a back-end cannot log its writes. The migration does not start in this time,
    /// or the guest has several CPUs.
    pub fn migrate_to(mut self, mut target: IncomingGuest, limit: Duration) -> Result<Migration> {
        let cpus = self.qmp(json!({"execute": "query-cpus-fast"}))?;
        // A script flushes the TLB of the CPU that runs it, not those of others.
        ensure!(cpus.as_array().is_some_and(|cpus| cpus.len() == 1), "the guest has several CPUs: {cpus}");
        let uri = format!("unix:{}", target.machine.directory().join("migration").display());
        target.machine.qmp.execute(json!({"execute": "migrate-incoming", "arguments": {"uri": uri}}))?;
        let mut migration = Migration { source: self, target };
        migration.set_parameters(HELD_BYTES_PER_S, NO_DOWNTIME)?;
        migration.source.qmp(json!({"execute": "migrate", "arguments": {"uri": uri}}))?;
        let end = Instant::now() + limit;
        // The first synchronisation comes before this status.
        while migration.state()?["status"] != "active" {
            ensure!(Instant::now() < end, "the migration does not start in {limit:?}");
            migration.source.let_run(Duration::from_millis(5))?;
        }
        // The processes of a script have page tables of their own.
        migration.source.run("true")?;
        migration.set_parameters(WALK_BYTES_PER_S, NO_DOWNTIME)?;
        Ok(migration)
    }
}

impl Migration {
    /// The guest in the first QEMU. It runs there until the migration is [finished](Self::finish).
    pub fn source(&mut self) -> &mut LinuxGuest {
        &mut self.source
    }

    /// Waits until QEMU has sent the memory up to the last 8 MiB, and lets it send no more until the
    /// [end](Self::finish). What is written to the sent pages now reaches the target only through a dirty log.
    ///
    /// # Errors
    ///
    /// The migration fails, or this takes longer than the limit.
    pub fn hold_near_the_end(&mut self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let mut is_slow = false;
        loop {
            let state = self.state()?;
            let remaining_bytes = state["ram"]["remaining"].as_u64().context("QEMU does not say what remains")?;
            if remaining_bytes < REST_BYTES {
                self.set_parameters(HELD_BYTES_PER_S, NO_DOWNTIME)?;
                return Ok(());
            }
            if !is_slow && remaining_bytes < LITTLE_BYTES {
                self.set_parameters(CRAWL_BYTES_PER_S, NO_DOWNTIME)?;
                is_slow = true;
            }
            ensure!(state["status"] != "completed", "the migration has ended early: {state}");
            ensure!(Instant::now() < end, "the migration has not come near its end after {limit:?}: {state}");
            self.source.let_run(Duration::from_millis(20))?;
        }
    }

    /// Ends the migration, and continues with the guest in the second QEMU. Its scripts continue too.
    ///
    /// # Errors
    ///
    /// The migration fails, or takes longer than the limit.
    pub fn finish(mut self, limit: Duration) -> Result<LinuxGuest> {
        self.set_parameters(CRAWL_BYTES_PER_S, ANY_DOWNTIME)?;
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

    /// Changes bandwidth and downtime.
    fn set_parameters(&mut self, bandwidth_bytes_per_s: u64, downtime: Duration) -> Result<()> {
        let arguments = json!({"max-bandwidth": bandwidth_bytes_per_s, "downtime-limit": downtime.as_millis() as u64});
        self.source.qmp(json!({"execute": "migrate-set-parameters", "arguments": arguments})).map(drop)
    }
}
