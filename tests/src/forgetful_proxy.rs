//! A connection between a front-end and a back-end that loses the front-end's request for dirty logging.
//!
//! It is the control of migration tests: they must find a back-end that does not log its writes.

use std::{
    net::Shutdown,
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::front_end::wire::{Message, Wire};

/// vhost-user, "Front-end message types".
const SET_FEATURES: u32 = 2;
const SET_VRING_ADDR: u32 = 9;
/// Feature bit `VHOST_F_LOG_ALL`.
const LOG_ALL: u64 = 1 << 26;
/// Flag `VHOST_VRING_F_LOG` of a vring's addresses, the second word of the message.
const VRING_LOG: u32 = 1;
/// Longer than any test runs.
const PATIENCE: Duration = Duration::from_secs(600);

/// A socket that looks like a back-end. One front-end can connect.
#[derive(Debug)]
pub struct ForgetfulProxy {
    thread: Option<JoinHandle<Result<()>>>,
}

impl ForgetfulProxy {
    /// Listens at `path`, and passes messages on to `back_end`.
    ///
    /// # Errors
    ///
    /// The socket cannot be made, or no back-end listens at `back_end`.
    pub fn start(path: &Path, back_end: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
        let back_end = UnixStream::connect(back_end).context("cannot connect to the back-end")?;
        Ok(Self { thread: Some(thread::spawn(move || serve(&listener, &back_end))) })
    }

    /// Waits until the front-end has disconnected.
    ///
    /// # Errors
    ///
    /// A message could not be passed on.
    pub fn wait(mut self) -> Result<()> {
        self.thread.take().map_or(Ok(()), |thread| thread.join().expect("the proxy does not panic"))
    }
}

fn serve(listener: &UnixListener, back_end: &UnixStream) -> Result<()> {
    let (front_end, _) = listener.accept().context("cannot accept a front-end")?;
    let (to_back_end, to_front_end) = (front_end.try_clone()?, back_end.try_clone()?);
    let answers = thread::spawn({
        let (from, to) = (Wire::new(to_front_end, PATIENCE)?, Wire::new(front_end.try_clone()?, PATIENCE)?);
        move || pass(&from, &to, |_| ())
    });
    let result = pass(&Wire::new(to_back_end, PATIENCE)?, &Wire::new(back_end.try_clone()?, PATIENCE)?, forget_logging);
    // The other direction ends with the connection.
    let _ = back_end.shutdown(Shutdown::Both);
    let _ = answers.join().expect("the proxy does not panic");
    result
}

/// Passes messages on until the connection ends. `change` may change each message before.
pub(crate) fn pass(from: &Wire, to: &Wire, change: impl Fn(&mut Message)) -> Result<()> {
    while let Some(mut message) = from.receive()? {
        change(&mut message);
        let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
        to.send(message.request, message.flags, &message.body, &fds)?;
    }
    Ok(())
}

fn forget_logging(message: &mut Message) {
    match message.request {
        SET_FEATURES => {
            if let Some(features) = message.body.first_chunk_mut::<8>() {
                *features = (u64::from_ne_bytes(*features) & !LOG_ALL).to_ne_bytes();
            }
        }
        SET_VRING_ADDR => {
            if let Some(flags) = message.body.get_mut(4..).and_then(<[u8]>::first_chunk_mut::<4>) {
                *flags = (u32::from_ne_bytes(*flags) & !VRING_LOG).to_ne_bytes();
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(request: u32, body: &[u8]) -> Vec<u8> {
        let mut message = Message { request, flags: 1, body: body.to_vec(), fds: vec![] };
        forget_logging(&mut message);
        message.body
    }

    #[test]
    fn the_proxy_removes_logging_and_nothing_else() {
        let features = |bits: u64| bits.to_ne_bytes().to_vec();
        assert_eq!(changed(SET_FEATURES, &features(0x1_4400_0000)), features(0x1_4000_0000));
        let words = |words: [u32; 4]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
        assert_eq!(changed(SET_VRING_ADDR, &words([7, 1, 9, 1])), words([7, 0, 9, 1]));
        assert_eq!(changed(1, &words([7, 1, 9, 1])), words([7, 1, 9, 1]));
    }

    #[test]
    fn the_proxy_passes_messages_and_answers_with_their_descriptors() {
        let directory = tempfile::tempdir().expect("a directory");
        let (here, there) = (directory.path().join("here"), directory.path().join("there"));
        let back_end = UnixListener::bind(&there).expect("a socket");
        let proxy = ForgetfulProxy::start(&here, &there).expect("a proxy");
        let front_end = Wire::connect(&here, PATIENCE).expect("a connection");
        let back_end = Wire::new(back_end.accept().expect("the proxy").0, PATIENCE).expect("a connection");

        let file = tempfile::tempfile().expect("a file");
        front_end.send(5, 1, b"table", &[file.as_fd()]).expect("sent");
        let message = back_end.receive().expect("received").expect("a message");
        assert_eq!((message.request, message.body.as_slice(), message.fds.len()), (5, b"table".as_slice(), 1));
        back_end.send(5, 5, b"yes", &[]).expect("sent");
        assert_eq!(front_end.receive().expect("received").expect("an answer").body, b"yes");

        drop(front_end);
        assert!(back_end.receive().expect("closed").is_none());
        proxy.wait().expect("all was passed on");
    }
}
