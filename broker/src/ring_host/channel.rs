//! A socket between the engine and a ring host: whole packets, each with its descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// The numbers of a packet: its kind, and what the kind needs.
pub(super) const WORDS: usize = 16;
/// The most descriptors of a packet.
const FDS_MAX: usize = 2;
/// The longest text of a packet in bytes. A longer one is cut.
const TEXT_BYTES_MAX: usize = 2048;
const WORDS_BYTES: usize = WORDS * size_of::<u64>();

/// What the socket carries at a time. Both ends are one program, so the numbers have its byte order.
#[derive(Debug, Default)]
pub(super) struct Packet {
    pub(super) words: [u64; WORDS],
    /// For people.
    pub(super) text: String,
    /// Close-on-exec. Fewer than were sent if this process may not open more files.
    pub(super) fds: Vec<OwnedFd>,
}

/// One end of a socket for packets (`SOCK_SEQPACKET`, `unix(7)`).
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// Both ends.
    pub(super) fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(one), Self(other)))
    }

    /// Sends a packet as a whole. Waits while the socket is full.
    ///
    /// # Errors
    ///
    /// The other end is gone (`EPIPE`), or the kernel has no memory.
    pub(super) fn send(&self, words: &[u64; WORDS], text: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut words_bytes = [0; WORDS_BYTES];
        for (bytes, word) in words_bytes.chunks_exact_mut(size_of::<u64>()).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        let parts = [IoSlice::new(&words_bytes), IoSlice::new(cut(text).as_bytes())];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(Errno::TOOBIG.into());
            }
            // A closed peer causes no SIGPIPE.
            match sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                result => return result.map(drop).map_err(io::Error::from),
            }
        }
    }

    /// Waits for the next packet. `None`: the other end is closed.
    ///
    /// # Errors
    ///
    /// The kernel's, and a packet that is too short.
    pub(super) fn receive(&self) -> io::Result<Option<Packet>> {
        let mut bytes = [0; WORDS_BYTES + TEXT_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let (len_bytes, fds) = loop {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) => {
                    let rights = control.drain().filter_map(|message| match message {
                        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                        _ => None,
                    });
                    break (message.bytes, rights.flatten().collect());
                }
                Err(Errno::INTR) => {}
                // The other end went without reading all.
                Err(Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        };
        if len_bytes == 0 {
            return Ok(None);
        }
        let Some((words_bytes, text)) = bytes[..len_bytes].split_at_checked(WORDS_BYTES) else {
            return Err(io::Error::other(format!("a packet of {len_bytes} bytes")));
        };
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(words_bytes.chunks_exact(size_of::<u64>())) {
            *word = u64::from_ne_bytes(bytes.try_into().expect("chunks of eight bytes"));
        }
        Ok(Some(Packet { words, text: String::from_utf8_lossy(text).into_owned(), fds }))
    }

    /// Sends a packet if the socket has room.
    #[cfg(test)]
    pub(super) fn send_now(&self, words: &[u64; WORDS]) -> bool {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        rustix::net::send(&self.0, &bytes, SendFlags::DONTWAIT).is_ok()
    }

    /// Waits until a packet is there or the other end is closed, at most this long. False: neither.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let timeout = timeout.map(|timeout| Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], timeout.as_ref()) {
            Ok(count) => Ok(count > 0),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The beginning of `text` that a packet has room for.
fn cut(text: &str) -> &str {
    let end = (0..=text.len().min(TEXT_BYTES_MAX)).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn packets_arrive_whole_with_their_descriptors_and_the_end_shows() {
        let (one, other) = Channel::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        let words = std::array::from_fn(|number| u64::MAX - number as u64);
        one.send(&words, "a reason", &[file.as_fd()]).unwrap();
        one.send(&[7; WORDS], "", &[]).unwrap();
        drop(one);
        assert!(other.wait(Some(Duration::ZERO)).unwrap());
        let first = other.receive().unwrap().unwrap();
        assert_eq!((first.words, first.text.as_str()), (words, "a reason"));
        let mut received = File::from(first.fds.into_iter().next().unwrap());
        received.rewind().unwrap();
        let mut content = String::new();
        received.read_to_string(&mut content).unwrap();
        assert_eq!(content, "content");
        let second = other.receive().unwrap().unwrap();
        assert_eq!((second.words, second.fds.len()), ([7; WORDS], 0));
        assert!(other.receive().unwrap().is_none());
        assert_eq!(other.send(&[0; WORDS], "", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_wait_ends_without_a_packet() {
        let (one, _other) = Channel::pair().unwrap();
        assert!(!one.wait(Some(Duration::from_millis(1))).unwrap());
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let (one, other) = Channel::pair().unwrap();
        let text = format!("x{}", "é".repeat(TEXT_BYTES_MAX));
        one.send(&[0; WORDS], &text, &[]).unwrap();
        let received = other.receive().unwrap().unwrap().text;
        assert!(text.starts_with(&received) && received.len() == TEXT_BYTES_MAX - 1, "{}", received.len());
    }
}
