//! The thread that waits for interrupts of queue 0.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;
use super::drivers::Drivers;
use super::queue_zero::SharedQueueZero;
use crate::eventfd;

/// How often the thread polls queue 0 without an interrupt, because an interrupt can be lost with a device. It polls
/// the queues that the application has not taken at the same time.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// The thread that takes the device's events and answers from queue 0, also while no other thread uses queue 0.
#[derive(Debug)]
pub(super) struct EventThread {
    stop: Arc<EventFd>,
    is_stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EventThread {
    /// Starts the thread.
    pub(super) fn start(queue_zero: Arc<SharedQueueZero>, drivers: Arc<Drivers>) -> Result<Self, Error> {
        Self::start_with(queue_zero, drivers, POLL_INTERVAL)
    }

    fn start_with(
        queue_zero: Arc<SharedQueueZero>,
        drivers: Arc<Drivers>,
        poll_interval: Duration,
    ) -> Result<Self, Error> {
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::system("making an eventfd"))?;
        let (stop, is_stopping) = (Arc::new(stop), Arc::new(AtomicBool::new(false)));
        let vring = queue_zero.lock().vring().clone();
        let (thread_stop, must_stop) = (stop.clone(), is_stopping.clone());
        let thread = thread::Builder::new()
            .name("ringpass-events".into())
            .spawn(move || {
                while !must_stop.load(Ordering::Acquire) {
                    let call = vring.call();
                    let timeout = Timespec::try_from(poll_interval).ok();
                    let mut fds = [&*call, &*thread_stop]
                        .map(|event| PollFd::from_borrowed_fd(eventfd::borrow(event), PollFlags::IN));
                    let _ = poll(&mut fds, timeout.as_ref());
                    let _ = call.read();
                    // The thread has taken the interrupt. Another thread that has the lock now may have reaped before
                    // the device returned the chain, so this thread waits for the lock and reaps.
                    let mut locked = queue_zero.lock();
                    if let Err(error) = locked.reap() {
                        tracing::error!("{error}");
                        // The users of the other queues find the same fault, and stop waiting.
                        locked.wake_other_queues();
                        return;
                    }
                    // The drivers of the other queues lock queue 0 themselves.
                    drop(locked);
                    drivers.progress();
                }
            })
            .map_err(Error::system("starting the thread for events"))?;
        Ok(Self { stop, is_stopping, thread: Some(thread) })
    }
}

impl Drop for EventThread {
    fn drop(&mut self) {
        self.is_stopping.store(true, Ordering::Release);
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::yield_now;
    use std::time::Instant;

    use super::super::queue_zero::QueueZeroRequest;
    use super::super::test_device::Guest;
    use super::*;

    /// Longer than a thread of a busy machine waits for a CPU.
    const LIMIT: Duration = Duration::from_secs(20);

    fn is_signalled(event: &EventFd, timeout: Duration) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(eventfd::borrow(event), PollFlags::IN)];
        poll(&mut fds, Timespec::try_from(timeout).ok().as_ref()).unwrap() > 0
    }

    #[test]
    fn the_thread_takes_an_answer_that_comes_while_another_thread_has_the_lock() {
        let guest = Guest::new();
        let (driver, _) = guest.driver();
        let user = driver.vring().clone();
        let mut device = guest.device_queue_zero();
        let _thread =
            EventThread::start_with(guest.queue_zero.clone(), Drivers::new([]), Duration::from_secs(3600)).unwrap();
        {
            let mut locked = guest.queue_zero.lock();
            assert!(locked.send(&QueueZeroRequest::Flush, Some(&user)).is_some());
            device.complete(0, &[], 0);
            let call = device.vring().call();
            call.write(1).unwrap();
            // The thread takes the interrupt while this one has the lock.
            let begin = Instant::now();
            while is_signalled(&call, Duration::ZERO) {
                assert!(begin.elapsed() < LIMIT, "the thread does not take the interrupt");
                yield_now();
            }
            // Give the thread time to wait for the lock.
            thread::sleep(Duration::from_millis(20));
        }
        assert!(is_signalled(&user.call(), LIMIT), "the thread did not reap");
    }

    #[test]
    fn a_fault_of_queue_0_wakes_the_users_of_the_other_queues() {
        let guest = Guest::new();
        let (driver, _) = guest.driver();
        let user = driver.vring().clone();
        guest.queue_zero.lock().set_other_queues(vec![user.clone()]);
        let device = guest.device_queue_zero();
        device.set_used_index(9);
        let _thread =
            EventThread::start_with(guest.queue_zero.clone(), Drivers::new([]), Duration::from_secs(3600)).unwrap();
        device.vring().call().write(1).unwrap();
        assert!(is_signalled(&user.call(), LIMIT));
    }
}
