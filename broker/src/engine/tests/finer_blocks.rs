//! Disks whose direct I/O takes larger blocks than the guest has: nothing is lost, torn, or written to a neighbour.

use std::collections::HashMap;

use super::rig::{DISK_BYTES, Options, Rig, SECTOR, content, contents};
use crate::disk::DirectIo;

const OK: u8 = 0;
const BLOCK: u32 = 4096;

fn finer(disk_bytes: u64) -> Options {
    let direct_block_bytes = Some(BLOCK);
    Options { direct_io: DirectIo::On, direct_block_bytes, disk_bytes, ..Options::default() }
}

/// How many requests of queue 0 were bounced, and how many wrote a part of a block.
fn counted(rig: &Rig) -> (u64, u64) {
    let counters = &rig.engine.control().counters()[0].clone();
    (counters.bounced.get(), counters.partial_writes.get())
}

#[test]
fn a_part_of_a_block_is_written_and_read_and_its_neighbours_stay() {
    let mut rig = Rig::new(finer(DISK_BYTES));
    let mut driver = rig.running(0);
    let mut expected = contents(0, 0, 64);
    for (round, (sector, sectors)) in [(0, 1), (7, 1), (9, 2), (14, 4), (17, 30), (48, 7), (55, 9)].iter().enumerate() {
        let data = contents(1 + round as u64, *sector, *sectors);
        assert_eq!(driver.write_data(*sector, &data).status, OK);
        expected[(sector * SECTOR) as usize..][..data.len()].copy_from_slice(&data);
        assert_eq!(rig.on_disk(0, 64 * SECTOR), expected, "after {sectors} sectors at {sector}");
        assert_eq!(driver.read(*sector, *sectors).data, data);
    }
    assert_eq!(counted(&rig), (14, 7));
}

#[test]
fn whole_blocks_go_to_the_disk_as_they_are() {
    let mut rig = Rig::new(finer(DISK_BYTES));
    let mut driver = rig.running(0);
    assert_eq!(driver.write_data(8, &contents(1, 8, 32)).status, OK);
    assert_eq!(driver.read(8, 32).data, contents(1, 8, 32));
    assert_eq!(counted(&rig), (0, 0));
}

#[test]
fn a_disk_that_does_not_end_with_a_whole_block_is_used_to_its_last_sector_and_stays_as_long_as_it_is() {
    let sectors = DISK_BYTES / SECTOR + 3;
    let end = sectors - 1;
    let mut rig = Rig::new(finer(sectors * SECTOR));
    let mut driver = rig.running(0);
    for (generation, (sector, count)) in [(1, (end, 1)), (2, (end - 2, 1)), (3, (end - 2, 3)), (4, (end - 7, 8))] {
        let data = contents(generation, sector, count);
        assert_eq!(driver.write_data(sector, &data).status, OK);
        assert_eq!(driver.read(sector, count).data, data);
        assert_eq!(rig.on_disk(sector, count * SECTOR), data);
    }
    // Longer than a bounce buffer, and across the end of the last whole block.
    let data = contents(5, sectors - 45, 45);
    assert_eq!(driver.write_data(sectors - 45, &data).status, OK);
    assert_eq!(driver.read(sectors - 45, 45).data, data);
    assert_eq!(driver.read(0, 8).data, contents(0, 0, 8));
    assert_eq!(driver.write_zeroes(end, 1, false).status, OK);
    assert_eq!(driver.read(end - 1, 2).data, [content(5, end - 1), [0; 512]].concat());
    assert_eq!(rig.image.as_file().metadata().unwrap().len(), sectors * SECTOR);
}

#[test]
fn requests_longer_than_a_bounce_buffer_are_written_between_their_neighbours() {
    let mut rig = Rig::new(finer(DISK_BYTES));
    let mut driver = rig.running(0);
    driver.data_gpa = Some(super::rig::SPARE_GPA);
    driver.misalignment_bytes = 3;
    driver.segment_bytes = 100_001;
    let data = contents(1, 13, 2001);
    assert_eq!(driver.write_data(13, &data).status, OK);
    assert_eq!(rig.on_disk(0, 2100 * SECTOR), [contents(0, 0, 13), data.clone(), contents(0, 2014, 86)].concat());
    assert_eq!(driver.read(13, 2001).data, data);
}

/// Queues on several workers write neighbouring sectors of a few blocks at the same time, each its own. Each sector is at last
/// what its queue wrote last.
#[test]
fn queues_that_write_neighbouring_sectors_at_the_same_time_lose_nothing() {
    const BLOCKS: u64 = 4;
    let mut rig = Rig::new(Options { queues: 4, workers: 3, ..finer(DISK_BYTES) });
    let drivers: Vec<_> = (0..4).map(|index| rig.running(index)).collect();
    std::thread::scope(|scope| {
        for mut driver in drivers {
            scope.spawn(move || {
                let own = u64::from(driver.index);
                for generation in 1..=60 {
                    let mut reads = HashMap::new();
                    for sector in (own..8 * BLOCKS).step_by(4) {
                        driver.add_write(sector, &content(generation, sector));
                        driver.kick();
                    }
                    while driver.depth() > 0 {
                        assert_eq!(driver.wait().status, OK);
                    }
                    for sector in (own..8 * BLOCKS).step_by(4) {
                        reads.insert(driver.add_read(sector, 1), sector);
                    }
                    while driver.depth() > 0 {
                        let outcome = driver.wait();
                        let sector = reads[&outcome.head];
                        assert!(outcome.data == content(generation, sector), "sector {sector} of write {generation}");
                    }
                }
            });
        }
    });
    for sector in 0..8 * BLOCKS {
        assert!(rig.on_disk(sector, SECTOR) == content(60, sector), "sector {sector}");
    }
}

/// A write or write zeroes to one sector, in the order of one clock.
#[derive(Clone, Copy, Debug)]
struct Change {
    /// Zero: zeroes.
    generation: u64,
    begun: u64,
    ended: Option<u64>,
}

/// What each sector may contain, whatever the order in which the device carries out what overlaps.
struct Model {
    sectors: Vec<Vec<Change>>,
    clock: u64,
}

impl Model {
    fn new(sectors: u64) -> Self {
        let first = Change { generation: u64::MAX, begun: 0, ended: Some(0) };
        Self { sectors: vec![vec![first]; sectors as usize], clock: 0 }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn begin(&mut self, generation: u64, sector: u64, sectors: u64) {
        let begun = self.tick();
        for sector in sector..sector + sectors {
            self.sectors[sector as usize].push(Change { generation, begun, ended: None });
        }
    }

    fn end(&mut self, generation: u64, sector: u64, sectors: u64) {
        let now = self.tick();
        for sector in sector..sector + sectors {
            let changes = &mut self.sectors[sector as usize];
            changes
                .iter_mut()
                .find(|change| change.generation == generation && change.ended.is_none())
                .unwrap()
                .ended = Some(now);
        }
    }

    /// Whether a read that began at `read_begun` and has ended now may have found this.
    fn allows(&self, sector: u64, read_begun: u64, bytes: &[u8]) -> bool {
        let changes = &self.sectors[sector as usize];
        changes.iter().any(|change| {
            let is_superseded = changes.iter().any(|later| {
                change.ended.is_some_and(|ended| ended < later.begun)
                    && later.ended.is_some_and(|ended| ended < read_begun)
            });
            !is_superseded && bytes == what(change.generation, sector)
        })
    }

    /// Forgets what no read can find that began at `oldest` or later.
    fn prune(&mut self, oldest: u64) {
        for changes in &mut self.sectors {
            let all = changes.clone();
            changes.retain(|change| {
                let supersedes = |later: &Change| {
                    change.ended.is_some_and(|ended| ended < later.begun)
                        && later.ended.is_some_and(|ended| ended < oldest)
                };
                !all.iter().any(supersedes)
            });
        }
    }
}

/// The content of a sector after a change. Zeroes have the even generations.
fn what(generation: u64, sector: u64) -> [u8; SECTOR as usize] {
    match generation {
        u64::MAX => content(0, sector),
        zeroes if zeroes % 2 == 0 => [0; 512],
        written => content(written, sector),
    }
}

#[derive(Clone, Copy)]
enum Asked {
    Change(u64),
    Read { begun: u64 },
}

/// Queues on several workers write single sectors, parts of blocks, whole blocks and zeroes over one another, and read. Each
/// read, and what is there at last, is a content that some order of the overlapping changes leaves.
#[test]
fn writes_of_parts_and_of_whole_blocks_and_zeroes_over_one_another_lose_nothing_and_tear_no_sector() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    // The last block is not whole.
    for sectors in [6 * 8, 3 * 8 + 5] {
        let options = Options { queues: 4, workers: 3, ..finer(sectors * SECTOR) };
        let mut rig = Rig::new(options);
        let mut drivers: Vec<_> = (0..4).map(|index| rig.running(index)).collect();
        let mut model = Model::new(sectors);
        let mut asked: HashMap<(usize, u16), (Asked, u64, u64)> = HashMap::new();
        let mut generation = 0;
        let requests = 5_000;
        let mut sent = 0;
        while sent < requests || !asked.is_empty() {
            for (number, driver) in drivers.iter_mut().enumerate() {
                while sent < requests && driver.depth() < 8 && driver.has_room(8 * 512) {
                    let (sector, count) = extent(&mut rng, sectors);
                    let (head, what) = match rng.u8(0..10) {
                        0..3 => (driver.add_read(sector, count), Asked::Read { begun: model.tick() }),
                        kind => {
                            generation += if kind == 9 { 2 - generation % 2 } else { 1 + generation % 2 };
                            model.begin(generation, sector, count);
                            let head = if kind == 9 {
                                driver.add_write_zeroes(sector, count as u32, rng.bool())
                            } else {
                                driver.add_write(sector, &contents(generation, sector, count))
                            };
                            (head, Asked::Change(generation))
                        }
                    };
                    asked.insert((number, head), (what, sector, count));
                    sent += 1;
                    driver.kick();
                }
                while let Some(outcome) = driver.poll() {
                    assert_eq!(outcome.status, OK);
                    let (what, sector, count) = asked.remove(&(number, outcome.head)).unwrap();
                    match what {
                        Asked::Change(generation) => model.end(generation, sector, count),
                        Asked::Read { begun } => {
                            for (sector, bytes) in (sector..).zip(outcome.data.chunks(SECTOR as usize)) {
                                assert!(model.allows(sector, begun, bytes), "a read of sector {sector}, seed {seed}");
                            }
                        }
                    }
                }
            }
            std::thread::yield_now();
            let reads = asked.values().filter_map(|(what, ..)| match what {
                Asked::Read { begun } => Some(*begun),
                Asked::Change(_) => None,
            });
            model.prune(reads.min().unwrap_or(model.clock));
        }
        let now = model.tick();
        for sector in 0..sectors {
            assert!(model.allows(sector, now, &rig.on_disk(sector, SECTOR)), "sector {sector} at last, seed {seed}");
        }
        assert!(counted(&rig).1 > 100, "parts of blocks were written");
    }
}

/// Mostly less than a block, sometimes whole blocks.
fn extent(rng: &mut fastrand::Rng, sectors: u64) -> (u64, u64) {
    if rng.u8(0..3) == 0 {
        return (rng.u64(0..sectors / 8) * 8, 8);
    }
    let sector = rng.u64(0..sectors);
    (sector, rng.u64(1..=(sectors - sector).min(8)))
}
