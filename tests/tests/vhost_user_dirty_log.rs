//! Live migration: the device marks every page that it writes in the front-end's log, from the acknowledgement on.

use std::{collections::BTreeSet, process::ExitCode, thread, time::Duration};

use anyhow::{Result, ensure};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    front_end::{
        load::{BLOCK_BYTES, LoadOptions, RunningLoad},
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
        shared::{DirtyPages, LOG_PAGE_BYTES},
        vring::VringLayout,
    },
    harness::{self, Test, test},
    seed::Seed,
};

const DISK_BYTES: u64 = 16 << 20;
const QUEUES: u16 = 2;

type Body = fn(&Rig) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Body); 2] = [
        ("the_device_marks_exactly_the_pages_that_a_request_writes_and_the_used_ring", one_request),
        ("the_device_misses_no_page_when_logging_starts_and_stops_under_load", under_load),
    ];
    let tests: Vec<Test> = tests
        .into_iter()
        .map(|(name, body)| {
            let needs = DiskKind::Ext4Direct.needs().into_iter().chain(broker_process::needs());
            test(name, needs, move || {
                let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
                let broker = rig.broker(&["--num-queues", "2"])?;
                broker.explain(body(&rig))
            })
        })
        .collect();
    harness::run(tests)
}

/// Does what QEMU does when a migration begins: sets the log, sends the addresses of running vrings again, and then
/// sets the feature.
fn start_logging(front_end: &FrontEnd, log: &DirtyPages, vrings: &[VringLayout]) -> Result<()> {
    front_end.connection().set_log_base(&log.description(), log.file())?;
    front_end.set_logging(true)?;
    for (index, layout) in (0u16..).zip(vrings) {
        front_end.connection().set_vring_addr(&front_end.vring_addr(index, layout, true)?)?;
    }
    Ok(())
}

fn stop_logging(front_end: &FrontEnd, vrings: &[VringLayout]) -> Result<()> {
    front_end.set_logging(false)?;
    for (index, layout) in (0u16..).zip(vrings) {
        front_end.connection().set_vring_addr(&front_end.vring_addr(index, layout, false)?)?;
    }
    Ok(())
}

fn one_request(rig: &Rig) -> Result<()> {
    let mut ram = TestRam::new(2, 8 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 0, 64 << 10)?;
    let layout = driver.vring().layout();
    let log = DirtyPages::new(&ram.ram)?;
    let page = |gpa: u64| gpa / LOG_PAGE_BYTES;
    let always = BTreeSet::from([page(layout.used_gpa), page(driver.status_gpa())]);

    driver.read(0, 4096)?;
    start_logging(&front_end, &log, &[layout])?;
    ensure!(log.marked()?.iter().all(|marked| *marked == page(layout.used_gpa)), "marked: {:?}", log.marked()?);
    for blocks in 1..=4u32 {
        log.clear()?;
        driver.read(0, blocks * 4096)?;
        let data = (0..u64::from(blocks)).map(|block| page(driver.data_gpa()) + block);
        let expected: BTreeSet<u64> = always.iter().copied().chain(data).collect();
        let marked = BTreeSet::from_iter(log.marked()?);
        ensure!(marked == expected, "a read of {blocks} pages: marked {marked:x?}, not {expected:x?}");
    }
    log.clear()?;
    driver.write(0, &[1; 8192])?;
    let marked = BTreeSet::from_iter(log.marked()?);
    ensure!(marked == always, "a write: marked {marked:x?}, not {always:x?}");

    stop_logging(&front_end, &[layout])?;
    log.clear()?;
    driver.read(0, 4096)?;
    ensure!(log.marked()?.is_empty(), "marked with logging off: {:x?}", log.marked()?);
    Ok(())
}

fn under_load(rig: &Rig) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut ram = TestRam::new(3, 8 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let blocks = DISK_BYTES / BLOCK_BYTES / u64::from(QUEUES);
    let (mut loads, mut vrings, mut eventfds, mut written) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for index in 0..QUEUES {
        let options = LoadOptions {
            indirect: true,
            unaligned: true,
            ..LoadOptions::new(u64::from(index) * blocks, blocks, 32, seed.derive(index))
        };
        let mut load = ram.load(&front_end, index, 128, options)?;
        vrings.push(load.vring().layout());
        eventfds.push(load.vring().eventfds().clone());
        written.push(load.written().clone());
        loads.push(RunningLoad::start(load));
    }
    for round in 0..harness::budget(40, 2_000) {
        let log = DirtyPages::new(&ram.ram)?;
        start_logging(&front_end, &log, &vrings)?;
        written.iter().for_each(|written| written.begin());
        loads.iter().for_each(|load| load.wait_for_progress(60));
        // A migration ends with stopped vrings. A cancelled one ends while they run.
        let ends = round % 2 == 0;
        if ends {
            for ((index, layout), written) in (0u16..).zip(&vrings).zip(&written) {
                let base = front_end.stop_vring(index)?;
                ensure!(base == layout.used_idx(&ram.ram)?, "a vring stopped with requests in flight");
                while written.next_used() != base && !loads[usize::from(index)].has_failed() {
                    thread::sleep(Duration::from_micros(100));
                }
            }
        }
        let pages: BTreeSet<u64> = written.iter().flat_map(|written| written.end()).collect();
        let marked = BTreeSet::from_iter(log.marked()?);
        stop_logging(&front_end, &vrings)?;
        if ends {
            for ((index, layout), eventfds) in (0u16..).zip(&vrings).zip(&eventfds) {
                front_end.start_vring(index, layout, eventfds, layout.used_idx(&ram.ram)?)?;
            }
        }
        let missed: Vec<u64> = pages.difference(&marked).copied().collect();
        ensure!(missed.is_empty(), "round {round}: written and not marked: {missed:x?} of {}", pages.len());
        if loads.iter().any(RunningLoad::has_failed) {
            break;
        }
        ensure!(!pages.is_empty(), "round {round}: nothing was written");
    }
    loads.into_iter().try_for_each(|load| load.finish()?.check_disk(&rig.disk_file()?))
}
