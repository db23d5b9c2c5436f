//! The clients of a control socket, side by side on one thread: no client waits for another.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

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
    state: State,
    /// When the server disconnects the client, unless the client waits for the answer.
    end: Instant,
}

#[derive(Debug)]
enum State {
    /// The request is not complete.
    Asking,
    /// The answer takes time.
    Waiting(Receiver<String>),
    /// The rest of the answer.
    Answered(Vec<u8>),
}

/// The answer to a request line.
#[derive(Debug)]
pub(super) enum Answer {
    Now(String),
    /// It comes through this channel; the sender wakes the thread of the clients.
    Later(Receiver<String>),
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
        self.clients.push(Client { stream, line: Vec::new(), state: State::Asking, end: Instant::now() + PATIENCE });
        Ok(())
    }

    /// The sockets and what to wait for on each.
    pub(super) fn to_poll(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        self.clients.iter().map(|client| (client.stream.as_fd(), client.awaits()))
    }

    /// When the first client runs out of time. `None`: there is no client.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.clients.iter().filter(|client| !client.is_waiting()).map(|client| client.end).min()
    }

    /// Advances all clients as far as possible without waiting, and disconnects those that have their answer, are gone
    /// or are too slow. `reply` returns the answer to a line.
    pub(super) fn advance(&mut self, reply: impl Fn(&[u8], &UnixStream) -> Answer) {
        let now = Instant::now();
        self.clients.retain_mut(|client| match client.advance(&reply) {
            Ok(Next::Wait) => client.is_waiting() || now < client.end,
            Ok(Next::HangUp) => false,
            Err(error) => {
                tracing::debug!(%error, "control client disconnected: its socket failed");
                false
            }
        });
    }
}

impl Client {
    fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting(_))
    }

    fn awaits(&self) -> PollFlags {
        match self.state {
            State::Asking => PollFlags::IN,
            // A client that hangs up is noticed; what it began goes on.
            State::Waiting(_) => PollFlags::empty(),
            State::Answered(_) => PollFlags::OUT,
        }
    }

    fn advance(&mut self, reply: &impl Fn(&[u8], &UnixStream) -> Answer) -> io::Result<Next> {
        if matches!(self.state, State::Asking) && self.read_line()? {
            self.state = match reply(&self.line, &self.stream) {
                Answer::Now(answer) => State::answered(answer),
                Answer::Later(answer) => State::Waiting(answer),
            };
        }
        if let State::Waiting(answer) = &self.state {
            match answer.try_recv() {
                Ok(answer) => {
                    self.end = Instant::now() + PATIENCE;
                    self.state = State::answered(answer);
                }
                Err(TryRecvError::Empty) => return self.while_waiting(),
                Err(TryRecvError::Disconnected) => return Ok(Next::HangUp),
            }
        }
        match &mut self.state {
            State::Asking | State::Waiting(_) => Ok(Next::Wait),
            State::Answered(rest) => send(&self.stream, rest),
        }
    }

    /// Finds out whether a client that waits for its answer has hung up.
    fn while_waiting(&self) -> io::Result<Next> {
        let fd = &mut [PollFd::new(&self.stream, PollFlags::empty())];
        poll(fd, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        let has_hung_up = fd[0].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        Ok(if has_hung_up { Next::HangUp } else { Next::Wait })
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

impl State {
    fn answered(answer: String) -> Self {
        let mut line = answer.into_bytes();
        line.push(b'\n');
        Self::Answered(line)
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

    fn reply(line: &[u8], _: &UnixStream) -> Answer {
        Answer::Now(format!("{} bytes", line.len()))
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
        clients.advance(|_, _| Answer::Now(long.clone()));
        assert_eq!(clients.to_poll().next().unwrap().1, PollFlags::OUT);
        let reading = std::thread::spawn(move || io::read_to_string(client).unwrap());
        while clients.next_end().is_some() {
            clients.advance(|_, _| unreachable!("it is answered once"));
        }
        assert_eq!(reading.join().unwrap().len(), long.len() + 1);
    }

    #[test]
    fn a_client_waits_for_an_answer_that_takes_time_beyond_the_limit_of_others() {
        let mut clients = Clients::default();
        let client = pair(&mut clients);
        (&client).write_all(b"\n").unwrap();
        let (answer, later) = std::sync::mpsc::channel();
        let later = std::cell::Cell::new(Some(later));
        clients.advance(|_, _| Answer::Later(later.take().expect("it is asked once")));
        clients.clients[0].end = Instant::now();
        clients.advance(reply);
        assert_eq!((clients.to_poll().count(), clients.next_end()), (1, None), "no limit while it waits");
        answer.send("done".into()).unwrap();
        clients.advance(reply);
        assert_eq!(io::read_to_string(client).unwrap(), "done\n");
    }

    #[test]
    fn a_client_that_hangs_up_while_it_waits_gives_up_its_place() {
        let mut clients = Clients::default();
        let client = pair(&mut clients);
        (&client).write_all(b"\n").unwrap();
        let (_answer, later) = std::sync::mpsc::channel();
        let later = std::cell::Cell::new(Some(later));
        clients.advance(|_, _| Answer::Later(later.take().expect("it is asked once")));
        drop(client);
        clients.advance(reply);
        assert_eq!(clients.to_poll().count(), 0);
    }
}
