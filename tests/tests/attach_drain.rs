//! The broker answers a front-end that removes memory only when no I/O can reach that memory any more, whether a ring
//! or a virtqueue executed it.

use std::{
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use ringpass_tests::{
    broker_process,
    front_end::{
        attach::{
            RingDriver,
            bench::{start_queue_zero, start_ring},
            slow::SlowGuest,
            wait_until,
        },
        blk::SECTOR_BYTES,
        descriptor::Descriptor,
        ram::RamRegion,
        session::FrontEnd,
    },
    harness::{self, test},
    needs::Need,
    stuck_disk::{StuckDisk, StuckKind},
};
use rustix::fs::{FallocateFlags, fallocate};
use vhost::vhost_user::message::FrontendReq;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_OK, VIRTIO_BLK_T_OUT};

const REGION_GPA: u64 = 4 << 30;
/// How long a test watches that something does not happen. If it were wrong, it would happen at once.
const AT_ONCE: Duration = Duration::from_millis(300);
/// Longer than a ring may keep memory from its front-end.
const LONG: Duration = Duration::from_millis(1600);
/// The most that an answer takes once there is nothing to wait for.
const PROMPT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let needs = || StuckDisk::needs().into_iter().chain(broker_process::needs()).collect::<Vec<Need>>();
    harness::run(vec![
        test("the_broker_keeps_the_ring_and_waits_for_its_io_in_removed_memory", needs(), ring_stays),
        test("the_broker_ends_the_ring_if_its_io_in_removed_memory_takes_long", needs(), ring_ends),
        test("the_broker_waits_for_io_of_a_virtqueue_in_removed_memory", needs(), virtqueue),
        test("the_broker_waits_for_io_in_removed_memory_of_a_ring_that_a_discard_ended", needs(), discarded),
        test("the_broker_waits_for_io_in_removed_memory_of_a_ring_that_other_memory_ended", needs(), not_pinned),
        test("the_next_front_end_does_not_wait_for_io_of_one_that_disconnected", needs(), gone),
        test("the_next_front_end_does_not_wait_for_one_that_disconnects_while_it_removes_memory", needs(), || {
            leaves_waiting(|guest| {
                guest.front_end.connection().rem_mem_reg(&guest.region.message(), Some(guest.region.file()))
            })
        }),
        test("the_next_front_end_does_not_wait_for_one_that_disconnects_while_it_stops_a_queue", needs(), || {
            leaves_waiting(|guest| guest.front_end.stop_vring(1).map(drop))
        }),
        test("the_next_front_end_does_not_wait_for_one_that_disconnects_while_it_disables_a_queue", needs(), || {
            leaves_waiting(|guest| guest.front_end.connection().set_vring(FrontendReq::SET_VRING_ENABLE, 1, 0))
        }),
    ])
}

/// A guest with a region of RAM that its front-end can remove.
struct Guest {
    slow: SlowGuest,
    front_end: FrontEnd,
    region: RamRegion,
}

impl Guest {
    fn new() -> Result<Self> {
        let slow = SlowGuest::new(StuckKind::LoopDevice)?;
        let front_end = slow.connect()?;
        let region = RamRegion::new(REGION_GPA, 1 << 20)?;
        front_end.connection().add_mem_reg(&region.message(), region.file())?;
        Ok(Self { slow, front_end, region })
    }

    /// Removes the region, and thaws the disk after a while.
    fn remove(&self, stuck_for: Duration) -> Result<()> {
        let connection = self.front_end.connection();
        thread::scope(|scope| {
            let removing = scope.spawn(|| connection.rem_mem_reg(&self.region.message(), Some(self.region.file())));
            thread::sleep(stuck_for);
            let is_early = removing.is_finished();
            self.slow.disk.thaw()?;
            let begin = Instant::now();
            removing.join().map_err(|_| anyhow!("the front-end panicked"))??;
            ensure!(!is_early, "the front-end was answered while a request used the region");
            ensure!(begin.elapsed() < PROMPT, "the answer took {:?} more", begin.elapsed());
            eprintln!("answered {:?} after the disk", begin.elapsed());
            Ok(())
        })
    }
}

fn ring_stays() -> Result<()> {
    with_ring(AT_ONCE, 1)
}

fn ring_ends() -> Result<()> {
    with_ring(LONG, 2)
}

fn with_ring(stuck_for: Duration, epoch: u32) -> Result<()> {
    let mut guest = Guest::new()?;
    let _queue_zero = start_queue_zero(&guest.front_end, &mut guest.slow.ram)?;
    let mut driver = start_ring(&guest.front_end, &mut guest.slow.ram, 1)?;
    driver.attach()?;
    // The broker pins the region when it makes the first ring.
    guest.slow.hang_from(&mut driver, REGION_GPA)?;
    let removed = guest.remove(stuck_for);
    guest.slow.broker.explain(removed)?;
    let result = (|| {
        let res = driver.wait(SlowGuest::HANGING)?;
        ensure!(res == 4096, "the write: {res}");
        driver.wait_epoch(epoch)?;
        // The ring still reaches the rest of the memory.
        ensure!(driver.read(SlowGuest::HANGING_OFFSET_BYTES, 4096)? == [0; 4096], "the write did not reach the disk");
        ensure!(driver.epoch() == Some(epoch), "epoch {:?}", driver.epoch());
        let res = driver.perform(driver.sqe_at(false, REGION_GPA, 4096, 0, 5)?)?;
        ensure!(res < 0, "the ring reaches memory that the front-end has removed");
        Ok(())
    })();
    guest.slow.broker.explain(result)
}

/// Makes the ring end with `end`, and then removes the memory that its hanging write uses.
fn with_ending_ring(end: impl FnOnce(&Guest) -> Result<()>) -> Result<()> {
    let mut guest = Guest::new()?;
    let _queue_zero = start_queue_zero(&guest.front_end, &mut guest.slow.ram)?;
    let mut driver = start_ring(&guest.front_end, &mut guest.slow.ram, 1)?;
    driver.attach()?;
    guest.slow.hang_from(&mut driver, REGION_GPA)?;
    end(&guest)?;
    thread::sleep(AT_ONCE);
    let removed = guest.remove(AT_ONCE);
    guest.slow.broker.explain(removed)
}

fn discarded() -> Result<()> {
    with_ending_ring(|guest| {
        let ram = &guest.slow.ram.ram.regions()[0];
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(ram.file(), flags, ram.len_bytes() - 8192, 4096)?;
        guest.slow.broker.wait_for_log("guest memory was discarded")
    })
}

fn not_pinned() -> Result<()> {
    with_ending_ring(|guest| {
        // The kernel cannot pin pages of a file on this file system.
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR"))?;
        file.set_len(1 << 20)?;
        let other = RamRegion::of_file(Arc::new(file), 0, 8 << 30, 1 << 20)?;
        guest.front_end.connection().add_mem_reg(&other.message(), other.file())?;
        guest.slow.broker.wait_for_log("rings end: the guest's memory changed")
    })
}

fn virtqueue() -> Result<()> {
    let mut guest = Guest::new()?;
    let _queue_zero = start_queue_zero(&guest.front_end, &mut guest.slow.ram)?;
    let mut driver = start_ring(&guest.front_end, &mut guest.slow.ram, 1)?;
    guest.slow.disk.freeze()?;
    let sector = SlowGuest::HANGING_OFFSET_BYTES / SECTOR_BYTES;
    driver.send_block(VIRTIO_BLK_T_OUT, sector, Descriptor::readable(REGION_GPA, 4096))?;
    guest.slow.disk.wait_for_hanging_write(|| guest.slow.broker.has_hanging_thread())?;
    ensure!(driver.vring().used_idx()? == 0, "the write did not hang");
    let removed = guest.remove(AT_ONCE);
    guest.slow.broker.explain(removed)?;
    wait_until("the write ends", || Ok(driver.vring().used_idx()? == 1))?;
    ensure!(driver.block_status()? == VIRTIO_BLK_S_OK as u8);
    Ok(())
}

/// The front-end disconnects while its I/O hangs, and the next one connects.
fn gone() -> Result<()> {
    let mut guest = Guest::new()?;
    let _driver = hanging_ring(&mut guest)?;
    make_room(&guest)
}

/// The same, but the front-end disconnects while it waits for the answer to a message. The broker does not answer that
/// message before the I/O ends.
fn leaves_waiting(ask: impl FnOnce(&Guest) -> Result<()>) -> Result<()> {
    let mut guest = Guest::new()?;
    let _driver = hanging_ring(&mut guest)?;
    guest.front_end.connection().wire().set_timeout(AT_ONCE)?;
    ensure!(ask(&guest).is_err(), "the message does not wait for I/O that hangs");
    make_room(&guest)
}

fn hanging_ring(guest: &mut Guest) -> Result<RingDriver> {
    let _queue_zero = start_queue_zero(&guest.front_end, &mut guest.slow.ram)?;
    let mut driver = start_ring(&guest.front_end, &mut guest.slow.ram, 1)?;
    driver.attach()?;
    guest.slow.hang_from(&mut driver, REGION_GPA)?;
    Ok(driver)
}

/// Disconnects the front-end, and checks that the broker answers the next one.
fn make_room(guest: &Guest) -> Result<()> {
    guest.front_end.connection().wire().hang_up()?;
    let begin = Instant::now();
    let next = guest.slow.connect().and_then(|front_end| {
        let region = RamRegion::new(REGION_GPA, 1 << 20)?;
        front_end.connection().add_mem_reg(&region.message(), region.file())?;
        front_end.connection().rem_mem_reg(&region.message(), Some(region.file()))
    });
    let elapsed = begin.elapsed();
    guest.slow.disk.thaw()?;
    guest.slow.broker.explain(next)?;
    ensure!(elapsed < PROMPT, "the next front-end waited {elapsed:?}");
    Ok(())
}
