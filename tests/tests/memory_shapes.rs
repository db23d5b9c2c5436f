//! Guest RAM of every shape: sizes, holes, slots and huge pages. A queue reaches the first and the last bytes of each
//! piece.

use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use ringpass_broker::{
    direct::SubmissionConfig,
    disk::Disk,
    ring::{RingConfig, SqThreadConfig},
};
use ringpass_tests::{
    disks::{DiskKind, TestDisk},
    harness::{self, budget, test},
    huge_pages::{self, HugePages},
    needs::Need,
    process_guest::{PageSize, Place, ProcessGuest, RamFile},
    ram_piece::{DISK_BYTES, Piece, edges},
    seed::Seed,
};
use ringpass_workload::hostile::Extent;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

const RING: RingConfig = RingConfig { sq_entries: 64, cq_entries: 128 };

fn main() -> ExitCode {
    let needs = |ram_bytes: u64| {
        let machine = [Need::io_uring(), Need::cpus(2), Need::available_memory_bytes(ram_bytes + GIB / 2)];
        DiskKind::Ext4PageCache.needs().into_iter().chain(machine).collect::<Vec<_>>()
    };
    let small = PageSize::Small;
    let pc = budget(
        vec![extent(0, 640 * KIB), extent(MIB, GIB + 63 * MIB), extent(4 * GIB, 64 * MIB)],
        vec![extent(0, 640 * KIB), extent(MIB, 3 * GIB - MIB), extent(4 * GIB, 9 * GIB)],
    );
    let top = vec![extent(0, 16 * MIB), extent(16 * TIB - 4 * MIB, 4 * MIB)];
    let huge = vec![extent(0, 32 * MIB), extent(GIB - 16 * MIB, 32 * MIB)];
    let huge_needs = needs(128 * MIB).into_iter().chain([Need::root(), huge_pages::supported()]);
    harness::run(vec![
        test("a_queue_reaches_every_end_of_16_mib", needs(16 * MIB), move || ends(&[extent(0, 16 * MIB)], small)),
        test("a_queue_reaches_every_end_of_2_gib", needs(2 * GIB), move || ends(&[extent(0, 2 * GIB)], small)),
        test("a_queue_reaches_every_end_of_the_ram_of_a_pc", needs(budget(2, 12) * GIB), move || ends(&pc, small)),
        test("a_queue_reaches_the_last_page_below_16_tib", needs(20 * MIB), move || ends(&top, small)),
        test("a_queue_reaches_every_end_of_huge_pages", huge_needs, move || {
            let _pages = HugePages::add(64)?;
            ends(&huge, PageSize::Huge)
        }),
    ])
}

const fn extent(gpa: u64, len_bytes: u64) -> Extent {
    Extent { gpa, len_bytes }
}

fn sq_thread() -> SubmissionConfig {
    SubmissionConfig::SqThread(SqThreadConfig::new(Duration::from_millis(2)))
}

/// Does verified I/O at both ends of every piece of RAM, with both ways of submission.
fn ends(regions: &[Extent], pages: PageSize) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let disk = Arc::new(Disk::open(&made.config())?);
    for submission in [sq_thread(), SubmissionConfig::Doorbell] {
        let start = Instant::now();
        let mut guest = ProcessGuest::new(&disk, RamFile::new(regions, pages)?, submission)?;
        let pinned_after = start.elapsed();
        let reserve = |edge: &Extent| guest.allocator().reserve(edge.gpa, edge.len_bytes);
        let areas = edges(regions).iter().map(reserve).collect::<Result<Vec<_>, _>>()?;
        let mut queue = guest.attach(RING, Place::GuestRam)?;
        let piece = |(index, area)| Piece::new(&queue, area, index, seed);
        let mut pieces = (0..).zip(areas).map(piece).collect::<Result<Vec<_>>>()?;
        pieces.iter_mut().try_for_each(|piece| piece.use_all(&mut queue))?;
        // A read to one piece must not overwrite the data that was read to another.
        pieces.iter_mut().try_for_each(|piece| piece.fill(&mut queue))?;
        pieces.iter().try_for_each(|piece| piece.check_file(guest.ram()))?;
        eprintln!("{} pieces, made and pinned in {pinned_after:?}", pieces.len());
        queue.close()?;
    }
    Ok(())
}
