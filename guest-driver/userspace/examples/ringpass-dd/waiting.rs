//! Waits for the server, and reports them.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use ringpass_guest::vhost_user::{Disk, Error, Options};

use crate::interrupt;

/// The program does not report a shorter wait.
const REPORT_AFTER: Duration = Duration::from_secs(1);
/// Pause between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(50);

/// Connects to a server, which may be about to start, or may have another front-end.
///
/// # Errors
///
/// The patience of `options` is over, a signal asks the program to end, or waiting cannot help.
pub(crate) fn connect(socket: &Path, options: Options) -> Result<Disk> {
    let begin = Instant::now();
    let patience_s = options.patience.as_secs();
    let mut has_reported = false;
    loop {
        interrupt::check()?;
        let left = options.patience.saturating_sub(begin.elapsed()).max(PAUSE);
        let notice = Notice::later(format!(
            "waiting up to {patience_s} s for an answer from the server at {}: it serves one front-end at a time, and another one \
             may be connected",
            socket.display()
        ));
        // The wait here counts, too: the device gets the rest of the patience.
        let connected = Disk::connect(socket, options.patience(left));
        drop(notice);
        match connected {
            Err(Error::Connect { source, .. })
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
                    && begin.elapsed() < options.patience =>
            {
                if !std::mem::replace(&mut has_reported, true) {
                    let path = socket.display();
                    eprintln!(
                        "ringpass-dd: no process listens on {path} yet; waiting up to {patience_s} s for a server"
                    );
                }
                thread::sleep(PAUSE);
            }
            other => return Ok(other?),
        }
    }
}

/// A line that is printed if the value lives longer than [`REPORT_AFTER`].
pub(crate) struct Notice(Option<(Sender<()>, JoinHandle<()>)>);

impl Notice {
    pub(crate) fn later(text: String) -> Self {
        let (over, wait) = channel::<()>();
        let thread = thread::Builder::new().name("notice".into()).spawn(move || {
            if wait.recv_timeout(REPORT_AFTER) == Err(RecvTimeoutError::Timeout) {
                eprintln!("ringpass-dd: {text}");
            }
        });
        // Without a thread the line is not printed.
        Self(thread.ok().map(|thread| (over, thread)))
    }
}

impl Drop for Notice {
    fn drop(&mut self) {
        if let Some((over, thread)) = self.0.take() {
            drop(over);
            // Join, so that the line does not appear after lines that are printed later.
            let _ = thread.join();
        }
    }
}
