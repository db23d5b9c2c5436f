//! A guest that has more requests outstanding than its CQ has entries.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ringpass_guest_abi::request::{EVENT_QUEUES, ErrorCode};
use ringpass_tests::front_end::{
    attach::{bench::start_ring, flooder::Reaping, whole},
    blk::BlkDriver,
};
use serde_json::Value;

use crate::{
    attack::{Attack, Hostile, QUEUE},
    host::{check_kernel_memory, with_kernel_memory_watched},
};

/// The longest that the ring of a guest which exceeds its CQ may run on, on a busy machine.
const FOUND: Duration = Duration::from_secs(5);
const PAGE_BYTES: u32 = 4096;

/// The server ends the ring, says so, and gives the queue no other ring for a while. The guest's other ring and the
/// queue itself work on.
pub(crate) fn loses_its_ring(submission: &str) -> Result<()> {
    let mut hostile = Hostile::start(Attack::SMALL_READS, submission)?;
    let mut other = start_ring(&hostile.front_end, &mut hostile.ram, 2)?;
    hostile.broker.explain(other.attach())?;
    let begin = Instant::now();
    let (submitted, grown_bytes) = with_kernel_memory_watched(|| {
        hostile.flooder.flood(Reaping::Never, || begin.elapsed() > FOUND)?;
        Ok(hostile.flooder.submitted())
    })?;
    let took = begin.elapsed();
    eprintln!("{submitted} requests in {took:?}");
    check_kernel_memory(grown_bytes)?;
    ensure!(took < FOUND, "the ring ran on for {took:?}");
    let Hostile { rig, broker, mut ram, front_end, mut first, mut flooder, buffer: _buffer } = hostile;
    broker.explain((|| {
        ensure!(flooder.wait_attach()? == whole(ErrorCode::Cost), "ATTACH has another outcome");
        ensure!(broker.has_logged("a ring ends: the guest had more requests outstanding than its CQ has entries"));
        let shown = rig.dev(&["show", "vhost", "--json"])?.output()?.stdout;
        let status: Value = serde_json::from_slice(&shown)?;
        ensure!(status["rings"]["ended_for_cost"] == 1, "{status:#}");
        let why = status["queues"][usize::from(QUEUE)]["why_no_ring"].as_str().unwrap_or_default();
        ensure!(why.contains("its CQ has 1024 entries: no ring for 10 s"), "{why}");
        ensure!(other.read(0, 512)?.len() == 512, "the other ring");

        let mut virtqueue = BlkDriver::new(flooder.into_vring(), &mut ram.arenas[0], PAGE_BYTES)?;
        ensure!(virtqueue.read(0, PAGE_BYTES)?.len() == PAGE_BYTES as usize);
        drop(virtqueue);
        front_end.stop_vring(QUEUE)?;
        let mut driver = start_ring(&front_end, &mut ram, QUEUE)?;
        driver.send_both(&driver.payload().to_bytes())?;
        ensure!(driver.wait_attach()? == whole(ErrorCode::Cost), "the pause is over");
        // Older news come first.
        first.post_event()?;
        while first.has_event_ended()? {
            first.wait_event()?;
            first.post_event()?;
        }
        ensure!(rig.dev(&["set", "vhost", "mode", "auto"])?.output()?.status.success());
        ensure!(first.wait_event()? & EVENT_QUEUES != 0, "the end of the pause is no event");
        let shown = rig.dev(&["show", "vhost"])?.output()?.stdout;
        ensure!(!String::from_utf8_lossy(&shown).contains("no ring for"), "the pause is still shown");
        driver.attach()?;
        ensure!(driver.read(0, 512)?.len() == 512, "the new ring");
        Ok(())
    })())
}

/// The words of the ring say that nothing is outstanding. The server asks the kernel.
pub(crate) fn liar() -> Result<()> {
    let mut hostile = Hostile::start(Attack::SMALL_READS, "sq-thread")?;
    let begin = Instant::now();
    let ((), grown_bytes) =
        with_kernel_memory_watched(|| hostile.flooder.flood(Reaping::Lying, || begin.elapsed() > FOUND))?;
    let took = begin.elapsed();
    eprintln!("{} requests in {took:?}", hostile.flooder.submitted());
    check_kernel_memory(grown_bytes)?;
    ensure!(took < FOUND, "the ring ran on for {took:?}");
    let found = hostile.flooder.wait_attach();
    ensure!(hostile.broker.explain(found)? == whole(ErrorCode::Cost), "ATTACH has another outcome");
    Ok(())
}
