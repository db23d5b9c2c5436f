//! Signals of the process as calls to the server.

use std::io;
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use tracing::{info, warn};

use super::server::ServerHandle;

/// SIGTERM, SIGINT and SIGHUP, kept from their usual effect.
#[derive(Debug)]
pub struct Signals {
    set: SigSet,
}

impl Signals {
    /// Blocks the signals in this thread and in all that it starts from now on: to be called before there are others.
    ///
    /// # Errors
    ///
    /// The kernel refuses, which no known one does.
    pub fn block() -> io::Result<Self> {
        let set = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect::<SigSet>();
        set.thread_block()?;
        Ok(Self { set })
    }

    /// Starts a thread that waits for them. SIGTERM and SIGINT stop the server; a second one does not wait for I/O and
    /// ends the process with status 1. SIGHUP has the size of the disk looked at.
    ///
    /// # Errors
    ///
    /// There is no thread to be had.
    pub fn spawn(self, server: ServerHandle) -> io::Result<()> {
        thread::Builder::new().name("signals".to_owned()).spawn(move || self.forward(&server)).map(|_| ())
    }

    fn forward(&self, server: &ServerHandle) {
        let mut is_stopping = false;
        loop {
            match self.set.wait() {
                Ok(Signal::SIGHUP) => {
                    info!("SIGHUP: looking at the size of the disk");
                    server.refresh_capacity();
                }
                Ok(signal) if is_stopping => {
                    warn!("{signal} again: ending at once, without waiting for I/O");
                    std::process::exit(1);
                }
                Ok(signal) => {
                    info!("{signal}: stopping");
                    is_stopping = true;
                    server.stop();
                }
                Err(errno) => warn!(%errno, "waiting for a signal"),
            }
        }
    }
}
