//! The front-end replaces the call eventfd of an open ring, and the driver loses no interrupt.

use std::{
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow, bail, ensure};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    front_end::{
        attach::{PATIENCE, RingDriver, bench::Bench},
        event::Event,
    },
    harness::{self, test},
    needs::Need,
};
use rustix::event::{Timespec, epoll};
use vhost::vhost_user::message::FrontendReq;

const DISK_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u32 = 4096;
/// Requests at once.
const DEPTH: usize = 8;

fn main() -> ExitCode {
    let needs = || DiskKind::Ext4PageCache.needs().into_iter().chain(broker_process::needs()).collect::<Vec<Need>>();
    harness::run(vec![
        test("a_driver_loses_no_interrupt_when_call_eventfds_change_under_load_by_sq_thread", needs(), || {
            call_eventfds("sq-thread")
        }),
        test("a_driver_loses_no_interrupt_when_call_eventfds_change_under_load_by_doorbell", needs(), || {
            call_eventfds("doorbell")
        }),
    ])
}

/// A VM's interrupt: a wait hears only the eventfd that was set last.
struct Interrupt {
    epoll: OwnedFd,
    current: Mutex<Option<Event>>,
}

impl Interrupt {
    fn new() -> Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, current: Mutex::new(None) })
    }

    /// Sets another eventfd, or none. It does not wake a waiting thread: the device must do that.
    fn set(&self, event: Option<Event>) -> Result<()> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = current.take() {
            epoll::delete(&self.epoll, old.as_fd())?;
        }
        if let Some(event) = &event {
            // Each signal is an interrupt, so nothing has to read the eventfd.
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&self.epoll, event.as_fd(), epoll::EventData::new_u64(0), flags)?;
        }
        *current = event;
        Ok(())
    }

    /// Returns false if no interrupt came.
    fn wait(&self, timeout: Duration) -> Result<bool> {
        let timeout = Timespec::try_from(timeout)?;
        let mut events = Vec::with_capacity(1);
        epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout))?;
        Ok(!events.is_empty())
    }
}

/// The progress of a driver that sleeps between interrupts.
#[derive(Default)]
struct Progress {
    completed: AtomicU64,
    interrupts: AtomicU64,
    is_over: AtomicBool,
}

fn call_eventfds(submission: &str) -> Result<()> {
    let arguments = ["--submission", submission, "--sq-idle-ms", "2"];
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &arguments)?;
    let mut driver = bench.attached(1)?;
    let (interrupt, progress) = (Interrupt::new()?, Progress::default());
    let changes: u64 = harness::budget(1000, 50_000);
    let connection = bench.front_end.connection();
    let change = |number: u64| -> Result<()> {
        if number % 10 == 9 {
            // The device polls this queue for a moment.
            connection.set_vring_fd(FrontendReq::SET_VRING_CALL, 1, None)?;
            interrupt.set(None)?;
        }
        let event = Event::new()?;
        connection.set_vring_fd(FrontendReq::SET_VRING_CALL, 1, Some(event.as_fd()))?;
        interrupt.set(Some(event))
    };
    change(0)?;
    let outcome = thread::scope(|scope| {
        let load = scope.spawn(|| load_by_interrupts(&mut driver, &interrupt, &progress));
        let changed = (1..changes).try_for_each(|number| -> Result<()> {
            change(number)?;
            // The thread pauses only sometimes, so that changes also follow one another at once.
            let goal = progress.completed.load(Ordering::Relaxed) + number % 4;
            while progress.completed.load(Ordering::Relaxed) < goal && !load.is_finished() {
                thread::yield_now();
            }
            Ok(())
        });
        progress.is_over.store(true, Ordering::Relaxed);
        load.join().map_err(|_| anyhow!("the load panicked"))?.and(changed)
    });
    bench.broker.explain(outcome)?;
    let (completed, interrupts) = (progress.completed.into_inner(), progress.interrupts.into_inner());
    eprintln!("{changes} changes, {completed} requests, {interrupts} interrupts waited for");
    ensure!(interrupts >= changes, "the driver did not wait for interrupts");
    Ok(())
}

/// Keeps requests under way, and looks at the ring only after an interrupt.
fn load_by_interrupts(driver: &mut RingDriver, interrupt: &Interrupt, progress: &Progress) -> Result<()> {
    let mut next = 0;
    loop {
        driver.reap();
        while let Some(cqe) = driver.pop_completion() {
            ensure!(cqe.res == BLOCK_BYTES as i32, "a read: {}", cqe.res);
            progress.completed.fetch_add(1, Ordering::Relaxed);
        }
        if progress.is_over.load(Ordering::Relaxed) {
            return Ok(());
        }
        while driver.outstanding().len() < DEPTH {
            next += 1;
            let offset_bytes = next % 4096 * u64::from(BLOCK_BYTES);
            driver.submit(driver.sqe(false, next, BLOCK_BYTES, offset_bytes, next)?)?;
        }
        if !interrupt.wait(PATIENCE)? {
            driver.reap();
            bail!("no interrupt, and {} of {DEPTH} requests have completed", DEPTH - driver.outstanding().len());
        }
        progress.interrupts.fetch_add(1, Ordering::Relaxed);
    }
}
