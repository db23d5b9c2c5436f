//! The thread that listens to queue 0.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;
use super::drivers::Drivers;
use super::shared::Shared;
use crate::eventfd;

/// How often the thread looks at queue 0 without an interrupt, because an interrupt can be lost with a device; and how often it looks
/// at the queues that the application has not taken.
const LOOK: Duration = Duration::from_millis(250);

/// The thread that takes the device's events and answers from queue 0 while no other thread uses queue 0.
#[derive(Debug)]
pub(super) struct Events {
    stop: Arc<EventFd>,
    is_stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Events {
    /// Starts the thread. `losses` returns how often the device was lost; with `has_inflight` the device then still knows the EVENT.
    pub(super) fn start(
        shared: Arc<Shared>,
        drivers: Arc<Drivers>,
        losses: impl Fn() -> u64 + Send + 'static,
        has_inflight: bool,
    ) -> Result<Self, Error> {
        Self::start_with(shared, drivers, losses, has_inflight, LOOK)
    }

    fn start_with(
        shared: Arc<Shared>,
        drivers: Arc<Drivers>,
        losses: impl Fn() -> u64 + Send + 'static,
        has_inflight: bool,
        look: Duration,
    ) -> Result<Self, Error> {
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::system("making an eventfd"))?;
        let (stop, is_stopping) = (Arc::new(stop), Arc::new(AtomicBool::new(false)));
        let setup = shared.first().setup().clone();
        let (theirs, is_told) = (stop.clone(), is_stopping.clone());
        let thread = thread::Builder::new()
            .name("ringpass-events".into())
            .spawn(move || {
                let mut seen = 0;
                while !is_told.load(Ordering::Acquire) {
                    let call = setup.call();
                    let timeout = Timespec::try_from(look).ok();
                    let mut fds =
                        [&*call, &*theirs].map(|event| PollFd::from_borrowed_fd(eventfd::borrow(event), PollFlags::IN));
                    let _ = poll(&mut fds, timeout.as_ref());
                    let _ = call.read();
                    // The thread has taken the interrupt, and a user that holds queue 0 now may have looked before the device wrote:
                    // so the thread has to look.
                    let mut first = shared.first();
                    let now = losses();
                    if now != std::mem::replace(&mut seen, now) && !has_inflight {
                        first.renew_event();
                    }
                    if let Err(error) = first.service() {
                        tracing::error!("{error}");
                        // The other users find the same fault, and stop waiting.
                        first.wake_others();
                        return;
                    }
                    // Their drivers lock queue 0 themselves.
                    drop(first);
                    drivers.progress();
                }
            })
            .map_err(Error::system("starting the thread for events"))?;
        Ok(Self { stop, is_stopping, thread: Some(thread) })
    }
}

impl Drop for Events {
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

    use super::super::first_queue::Question;
    use super::super::test_device::Guest;
    use super::*;

    /// Longer than a thread of a busy machine takes.
    const LIMIT: Duration = Duration::from_secs(20);

    fn is_signalled(event: &EventFd, timeout: Duration) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(eventfd::borrow(event), PollFlags::IN)];
        poll(&mut fds, Timespec::try_from(timeout).ok().as_ref()).unwrap() > 0
    }

    #[test]
    fn an_answer_that_comes_while_a_user_has_queue_0_is_not_left_lying() {
        let guest = Guest::new();
        let (driver, _) = guest.driver();
        let user = driver.setup().clone();
        let mut device = guest.device_queue(guest.shared.first().setup().clone());
        let _events =
            Events::start_with(guest.shared.clone(), Drivers::new([]), || 0, true, Duration::from_secs(3600)).unwrap();
        {
            let mut first = guest.shared.first();
            assert!(first.ask(&Question::Flush, Some(&user)).is_some());
            device.complete(0, &[], 0);
            let call = device.setup().call();
            call.write(1).unwrap();
            // The thread takes the interrupt after the user has looked at the queue.
            let begin = Instant::now();
            while is_signalled(&call, Duration::ZERO) {
                assert!(begin.elapsed() < LIMIT, "the thread does not take the interrupt");
                yield_now();
            }
            // Time for the thread to try.
            thread::sleep(Duration::from_millis(20));
        }
        assert!(is_signalled(&user.call(), LIMIT), "no thread looked at queue 0 again");
    }

    #[test]
    fn users_of_other_queues_are_woken_up_when_queue_0_breaks() {
        let guest = Guest::new();
        let (driver, _) = guest.driver();
        let user = driver.setup().clone();
        guest.shared.first().set_others(vec![user.clone()]);
        let device = guest.device_queue(guest.shared.first().setup().clone());
        device.say_used(9);
        let _events =
            Events::start_with(guest.shared.clone(), Drivers::new([]), || 0, true, Duration::from_secs(3600)).unwrap();
        device.setup().call().write(1).unwrap();
        assert!(is_signalled(&user.call(), LIMIT));
    }
}
