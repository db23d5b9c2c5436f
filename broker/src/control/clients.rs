//! The clients of a control socket, side by side on one thread: no client waits for another.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

/// The longest request line.
const LINE_BYTES_MAX: usize = 4096;
/// How long a client may take to send its request and to read the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// The most clients at a time. A further client replaces the oldest.
pub(super) const CLIENTS_MAX: usize = 16;

/// Clients that have not been answered completely.
#[derive(Debug, Default)]
pub(super) struct Clients {
    /// The oldest client first.
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    line: Vec<u8>,
    /// The rest of the answer to send. None: the request is not complete.
    answer: Option<Vec<u8>>,
    end: Instant,
}

/// What to do with a client next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Wait,
    HangUp,
}

impl Clients {
    /// Adds a client.
    ///
    /// # Errors
    ///
    /// The kernel refuses to make its socket non-blocking.
    pub(super) fn add(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        if self.clients.len() == CLIENTS_MAX {
            // All clients have the same right: each may open the socket (`--control-socket-mode`,
            // `--control-socket-group`). Most have their answer long before so many more connect.
            self.clients.remove(0);
            tracing::debug!("control client disconnected: a new client takes its place");
        }
        self.clients.push(Client { stream, line: Vec::new(), answer: None, end: Instant::now() + PATIENCE });
        Ok(())
    }

    /// The sockets and what to wait for on each.
    pub(super) fn to_poll(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        self.clients.iter().map(|client| (client.stream.as_fd(), client.awaits()))
    }

    /// When the first client runs out of time. `None`: there is no client.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.clients.iter().map(|client| client.end).min()
    }

    /// Advances all clients as far as possible without waiting, and disconnects those that have their answer, are gone
    /// or are too slow. `reply` returns the answer to a line.
    pub(super) fn advance(&mut self, reply: impl Fn(&[u8]) -> String) {
        let now = Instant::now();
        self.clients.retain_mut(|client| match client.advance(&reply) {
            Ok(Next::Wait) => now < client.end,
            Ok(Next::HangUp) => false,
            Err(error) => {
                tracing::debug!(%error, "control client disconnected: its socket failed");
                false
            }
        });
    }
}

impl Client {
    fn awaits(&self) -> PollFlags {
        if self.answer.is_none() { PollFlags::IN } else { PollFlags::OUT }
    }

    fn advance(&mut self, reply: &impl Fn(&[u8]) -> String) -> io::Result<Next> {
        if self.answer.is_none() && self.read_line()? {
            let mut answer = reply(&self.line).into_bytes();
            answer.push(b'\n');
            self.answer = Some(answer);
        }
        match &mut self.answer {
            None => Ok(Next::Wait),
            Some(answer) => send(&self.stream, answer),
        }
    }

    /// Reads up to the end of a line, of the stream, or of the longest request. False: more will come.
    fn read_line(&mut self) -> io::Result<bool> {
        let mut part = [0; 512];
        while self.line.len() < LINE_BYTES_MAX && !self.line.contains(&b'\n') {
            match (&self.stream).read(&mut part) {
                Ok(0) => return Ok(true),
                Ok(count) => self.line.extend_from_slice(&part[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

fn send(mut stream: &UnixStream, rest: &mut Vec<u8>) -> io::Result<Next> {
    while !rest.is_empty() {
        match stream.write(rest) {
            Ok(count) => drop(rest.drain(..count)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Next::Wait),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Next::HangUp)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(line: &[u8]) -> String {
        format!("{} bytes", line.len())
    }

    fn pair(clients: &mut Clients) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        clients.add(theirs).unwrap();
        ours
    }

    #[test]
    fn a_silent_client_delays_no_other_and_is_disconnected_when_its_time_is_up() {
        let mut clients = Clients::default();
        let silent = pair(&mut clients);
        let asking = pair(&mut clients);
        (&asking).write_all(b"12\n").unwrap();
        clients.advance(reply);
        assert_eq!(io::read_to_string(asking).unwrap(), "3 bytes\n");
        assert_eq!(clients.to_poll().count(), 1);
        clients.clients[0].end = Instant::now();
        clients.advance(reply);
        assert_eq!((&silent).read(&mut [0]).unwrap(), 0, "it is disconnected");
    }

    #[test]
    fn one_client_too_many_replaces_the_oldest() {
        let mut clients = Clients::default();
        let all: Vec<UnixStream> = (0..=CLIENTS_MAX).map(|_| pair(&mut clients)).collect();
        assert_eq!(clients.to_poll().count(), CLIENTS_MAX);
        assert_eq!((&all[0]).read(&mut [0]).unwrap(), 0, "it is disconnected");
        (&all[CLIENTS_MAX]).write_all(b"\n").unwrap();
        clients.advance(reply);
        assert_eq!(io::read_to_string(&all[CLIENTS_MAX]).unwrap(), "1 bytes\n");
    }

    #[test]
    fn a_long_answer_is_sent_in_pieces() {
        let mut clients = Clients::default();
        let client = pair(&mut clients);
        (&client).write_all(b"\n").unwrap();
        let long = "x".repeat(1 << 20);
        clients.advance(|_| long.clone());
        assert_eq!(clients.to_poll().next().unwrap().1, PollFlags::OUT);
        let reading = std::thread::spawn(move || io::read_to_string(client).unwrap());
        while clients.next_end().is_some() {
            clients.advance(|_| unreachable!("it is answered once"));
        }
        assert_eq!(reading.join().unwrap().len(), long.len() + 1);
    }
}
