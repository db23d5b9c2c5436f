//! A process that dies between any two of its stores loses no request and returns none twice.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::driver::Driver;
use crate::virtqueue::crash::{live_for, stores_made};
use crate::virtqueue::{InflightQueue, InflightRegion, QueueSetup, SplitQueue};

const SIZE: u16 = 4;

/// The next step of the driver or the device.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The driver makes a chain available, if it has one.
    Submit,
    /// The driver takes the returned chains.
    Reap,
    /// The device takes a chain, if there is one.
    Pop,
    /// The device returns the given one of its chains, and publishes all returned chains.
    Complete(usize),
    /// The device returns one of its chains without publishing it.
    AddUsed(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Submit),
        1 => Just(Step::Reap),
        3 => Just(Step::Pop),
        2 => (0..usize::from(SIZE)).prop_map(Step::Complete),
        2 => (0..usize::from(SIZE)).prop_map(Step::AddUsed),
    ]
}

/// The state that outlives the device: the driver, guest memory, the in-flight region.
struct World {
    driver: Driver,
    region: File,
    size_bytes: u64,
    /// Requests that were made available and not returned yet, in that order: head and number.
    outstanding: Vec<(u16, u64)>,
    free: VecDeque<u16>,
    submitted: u64,
}

impl World {
    fn new() -> Self {
        let file = InflightRegion::create(1, SIZE).expect("a memfd");
        // No process has used the region (version 0), but all of its entries look in flight.
        let region = File::from(file.fd);
        region.write_all_at(&[1; 64], 16).expect("its entries");
        Self {
            // The indexes wrap during the test.
            driver: Driver::at_index(SIZE, 65534),
            region,
            size_bytes: file.size_bytes,
            outstanding: Vec::new(),
            free: (0..SIZE).collect(),
            submitted: 0,
        }
    }

    fn inflight(&self) -> InflightQueue {
        let fd = self.region.try_clone().expect("a file descriptor").into();
        let region = InflightRegion::from_fd(fd, 0, self.size_bytes, 1, SIZE).expect("our own region");
        region.queue(0).expect("its only queue")
    }

    fn submit(&mut self) {
        if let Some(head) = self.free.pop_front() {
            self.submitted += 1;
            self.driver.submit(head, self.submitted);
            self.outstanding.push((head, self.submitted));
        }
    }

    /// Takes all returned chains. Each must be outstanding, and is not outstanding afterwards.
    fn reap(&mut self) {
        while let Some((id, written_bytes)) = self.driver.reap() {
            let head = u16::try_from(id).expect("a head");
            let place = self.outstanding.iter().position(|&(outstanding, _)| outstanding == head);
            let (_, number) = self.outstanding.remove(place.expect("given back, but not outstanding"));
            assert_eq!(u64::from(written_bytes), number, "the entry belongs to another request");
            self.free.push_back(head);
        }
    }
}

/// A device process.
struct Device {
    queue: SplitQueue,
    /// Taken and not returned: head and number.
    taken: Vec<(u16, u64)>,
}

impl Device {
    fn start(world: &World) -> Self {
        let setup = QueueSetup { inflight: Some(world.inflight()), ..world.driver.setup() };
        // After a crash a front-end can only give the index of the used ring.
        let setup = QueueSetup { next_avail: world.driver.load(super::driver::USED_RING + 2), ..setup };
        let queue = SplitQueue::new(setup, &world.driver.memory).expect("a good region");
        Self { queue, taken: Vec::new() }
    }

    fn pop(&mut self, world: &World) -> Option<u64> {
        let (head, mut chain) = self.queue.pop_recorded(&world.driver.memory).expect("an honest driver")?;
        let number = chain.next().expect("one descriptor").expect("in the table").addr().0;
        self.taken.push((head, number));
        Some(number)
    }

    fn add_used(&mut self, which: usize) {
        if !self.taken.is_empty() {
            let (head, number) = self.taken.remove(which % self.taken.len());
            self.queue.add_used(head, number as u32, None).expect("in flight");
        }
    }

    fn complete(&mut self, which: usize) {
        self.add_used(which);
        self.queue.publish(None);
    }

    fn step(&mut self, world: &mut World, step: Step) {
        match step {
            Step::Submit => world.submit(),
            Step::Reap => world.reap(),
            Step::Pop => drop(self.pop(world)),
            Step::Complete(which) => self.complete(which),
            Step::AddUsed(which) => self.add_used(which),
        }
    }
}

/// Runs the script in processes that each die after a number of stores, and in a last one that lives.
fn run(script: &[Step], lives: &[u64]) {
    let mut world = World::new();
    let mut done = 0;
    for &stores in lives {
        // A step that is cut short in the device has happened as far as it got; the next process does not repeat it.
        let _died = live_for(stores, || {
            let mut device = Device::start(&world);
            while let Some(&step) = script.get(done) {
                done += 1;
                device.step(&mut world, step);
            }
        });
        world.reap();
    }

    let mut device = Device::start(&world);
    assert!(device.queue.needs_signal(), "earlier processes may have died before they signalled");
    let expected: Vec<u64> = world.outstanding.iter().map(|&(_, number)| number).collect();
    let taken: Vec<u64> = std::iter::from_fn(|| device.pop(&world)).collect();
    assert_eq!(taken, expected, "all outstanding requests, in the order of submission");
    while !device.taken.is_empty() {
        device.complete(1);
    }
    world.reap();
    assert_eq!(world.outstanding, [], "each came back");
    // The region agrees: there is nothing left to replay.
    let after = Device::start(&world);
    assert_eq!((after.queue.in_flight(), after.queue.next_avail()), (0, world.driver.avail_idx));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_device_that_dies_at_any_store_loses_and_repeats_no_request(
        script in prop::collection::vec(any_step(), 1..40),
        second_life in 0..60_u64,
        third_life in 0..60_u64,
    ) {
        let before = stores_made();
        run(&script, &[u64::MAX]);
        let stores = stores_made() - before;
        for first_life in 0..=stores {
            run(&script, &[first_life]);
            run(&script, &[first_life, second_life, third_life]);
        }
    }
}

#[test]
fn a_life_ends_at_the_requested_store() {
    let before = stores_made();
    assert_eq!(live_for(3, || Device::start(&World::new()).queue.size()), None, "preparing a region takes more stores");
    assert_eq!(stores_made() - before, 3);
    assert_eq!(live_for(u64::MAX, || Device::start(&World::new()).queue.size()), Some(SIZE));
}
