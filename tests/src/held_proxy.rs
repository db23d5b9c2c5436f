//! A connection between a front-end and a back-end that a test holds in the middle of its set-up.
//!
//! At this moment the device already has a part of the front-end's state, for example its memory.

use std::{
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{forgetful_proxy::pass, front_end::wire::Wire};

/// vhost-user, "Front-end message types": the first message of a queue. The front-end has sent all memory before.
const SET_VRING_NUM: u32 = 8;
/// Longer than any test runs.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longer than a front-end takes to connect.
const LIMIT: Duration = Duration::from_secs(40);

/// A socket that looks like a back-end, for a front-end that connects twice.
#[derive(Debug)]
pub struct HeldProxy {
    held: Receiver<()>,
    go_on: Sender<()>,
}

impl HeldProxy {
    /// Listens at `path`, and passes messages on to `back_end`. It holds the second connection before its queues are
    /// set up.
    ///
    /// # Errors
    ///
    /// The socket cannot be made.
    pub fn start(path: &Path, back_end: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
        let back_end = back_end.to_owned();
        let ((told, held), (go_on, may_go_on)) = (channel(), channel());
        thread::spawn(move || -> Result<()> {
            connect(&listener, &back_end, || ())?;
            connect(&listener, &back_end, || {
                let _ = told.send(());
                let _ = may_go_on.recv();
            })
        });
        Ok(Self { held, go_on })
    }

    /// Waits until it holds the second connection.
    ///
    /// # Errors
    ///
    /// The front-end does not get so far.
    pub fn wait(&self) -> Result<()> {
        self.held.recv_timeout(LIMIT).context("the front-end does not connect again")
    }

    /// Lets the second connection continue.
    pub fn go_on(self) {
        let _ = self.go_on.send(());
    }
}

/// Serves one front-end to its end. It calls `hold` before the first message about a queue.
fn connect(listener: &UnixListener, back_end: &Path, hold: impl Fn()) -> Result<()> {
    let (front_end, _) = listener.accept()?;
    let back_end = UnixStream::connect(back_end)?;
    let (from, to) = (Wire::new(back_end.try_clone()?, PATIENCE)?, Wire::new(front_end.try_clone()?, PATIENCE)?);
    let answers = thread::spawn(move || pass(&from, &to, |_| ()));
    let is_held = std::cell::Cell::new(false);
    let passed = pass(&Wire::new(front_end, PATIENCE)?, &Wire::new(back_end.try_clone()?, PATIENCE)?, |message| {
        if message.request == SET_VRING_NUM && !is_held.replace(true) {
            hold();
        }
    });
    // The other direction ends with the connection.
    let _ = back_end.shutdown(std::net::Shutdown::Both);
    let _ = answers.join();
    // Some tests want a front-end that disconnects in the middle.
    passed.or(Ok(()))
}
