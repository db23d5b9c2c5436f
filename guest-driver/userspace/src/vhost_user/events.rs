//! The thread that listens to queue 0.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;
use super::connection::Connection;
use super::shared::Shared;
use crate::raw;

/// How often queue 0 is looked at without an interrupt, for one that was lost with a device.
const LOOK: Duration = Duration::from_millis(250);

/// The thread that takes what the device tells of on queue 0 while nobody else uses that.
#[derive(Debug)]
pub(super) struct Events {
    stop: Arc<EventFd>,
    is_stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Events {
    pub(super) fn start(shared: Arc<Shared>, connection: Arc<Connection>, has_inflight: bool) -> Result<Self, Error> {
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::system("making an eventfd"))?;
        let (stop, is_stopping) = (Arc::new(stop), Arc::new(AtomicBool::new(false)));
        let (theirs, is_told) = (stop.clone(), is_stopping.clone());
        let thread = thread::Builder::new()
            .name("ringpass-events".into())
            .spawn(move || {
                let mut reconnects = 0;
                while !is_told.load(Ordering::Acquire) {
                    let call = shared.first().setup().call();
                    let timeout = Timespec::try_from(LOOK).ok();
                    let mut fds =
                        [&*call, &*theirs].map(|event| PollFd::from_borrowed_fd(raw::borrow(event), PollFlags::IN));
                    let _ = poll(&mut fds, timeout.as_ref());
                    let _ = call.read();
                    // Whoever has the queue takes what comes for everybody.
                    let Some(mut first) = shared.try_first() else { continue };
                    let lost = connection.reconnects() != std::mem::replace(&mut reconnects, connection.reconnects());
                    if lost && !has_inflight {
                        first.renew_event();
                    }
                    if let Err(error) = first.service() {
                        tracing::error!("{error}");
                        return;
                    }
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
