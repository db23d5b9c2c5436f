//! A connection between a front-end and a back-end that is held in the middle of its set-up.
//!
//! What a front-end changes in this moment concerns a device that knows a part already.

use std::{
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{forgetful_proxy::pass, front_end::wire::Wire};

/// vhost-user, "Front-end message types": the first one of a queue. All memory was told before.
const SET_VRING_NUM: u32 = 8;
/// Longer than any test.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longer than a front-end takes to connect.
const LIMIT: Duration = Duration::from_secs(40);

/// A socket behind which a back-end seems to be, for a front-end that connects twice.
#[derive(Debug)]
pub struct HeldProxy {
    held: Receiver<()>,
    go_on: Sender<()>,
}

impl HeldProxy {
    /// Listens at `path`, and passes what comes there on to `back_end`. The second connection is held before its queues are set up.
    ///
    /// # Errors
    ///
    /// The socket cannot be made.
    pub fn start(path: &Path, back_end: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| format!("listening at {}", path.display()))?;
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

    /// Waits until the second connection is held.
    ///
    /// # Errors
    ///
    /// The front-end does not come so far.
    pub fn wait(&self) -> Result<()> {
        self.held.recv_timeout(LIMIT).context("the front-end does not connect again")
    }

    /// Lets it go on.
    pub fn go_on(self) {
        let _ = self.go_on.send(());
    }
}

/// Serves one front-end to its end. Before the first message about a queue, `hold` is called.
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
    // A front-end that leaves in the middle of something is the test's wish.
    passed.or(Ok(()))
}
