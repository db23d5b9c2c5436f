use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver as Answer, Sender as Reply, TryRecvError, channel};
use std::thread;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Longer than any test should wait.
const PATIENCE: Duration = Duration::from_secs(60);

/// Entries of the kinds that the builder has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mail {
    /// Of this queue. Replaced by the next one of the same queue.
    Build(u16, u32),
    /// Replaced by the next one.
    Unpin,
    /// Each one counts, and changes memory.
    SetMemory(u32),
    /// Each one counts.
    SetDisk(u32),
}

impl Entry for Mail {
    fn replaces(&self, earlier: &Self) -> bool {
        match (self, earlier) {
            (Self::Build(queue, _), Self::Build(other, _)) => queue == other,
            (Self::Unpin, Self::Unpin) => true,
            _ => false,
        }
    }

    fn changes_memory(&self) -> bool {
        matches!(self, Self::SetMemory(_))
    }
}

fn next(receiver: &Receiver<Mail>) -> Result<Mail, RecvTimeoutError> {
    receiver.next(Some(Duration::ZERO))
}

#[test]
fn entries_that_are_repeated_while_the_receiver_is_busy_are_in_the_mailbox_once() {
    let (sender, receiver) = mailbox();
    for id in 0..1000 {
        sender.send(Mail::Build(1, id));
        sender.send(Mail::Unpin);
        sender.send(Mail::Build(2, id));
    }
    assert_eq!(next(&receiver), Ok(Mail::Build(1, 999)));
    assert_eq!(next(&receiver), Ok(Mail::Unpin));
    assert_eq!(next(&receiver), Ok(Mail::Build(2, 999)));
    assert_eq!(next(&receiver), Err(RecvTimeoutError::Timeout));

    // After the receiver has taken an entry, the next one has a place of its own.
    sender.send(Mail::Unpin);
    sender.send(Mail::Build(1, 1000));
    assert_eq!(next(&receiver), Ok(Mail::Unpin));
    assert_eq!(next(&receiver), Ok(Mail::Build(1, 1000)));
    assert_eq!(next(&receiver), Err(RecvTimeoutError::Timeout));
}

#[test]
fn changes_are_coming_until_the_receiver_has_taken_the_last_of_them() {
    let (sender, receiver) = mailbox();
    sender.send(Mail::SetDisk(0));
    assert!(!receiver.changes().are_coming());
    sender.send(Mail::SetMemory(1));
    sender.send(Mail::SetMemory(2));
    for (mail, are_coming) in [(Mail::SetDisk(0), true), (Mail::SetMemory(1), true), (Mail::SetMemory(2), false)] {
        assert!(receiver.changes().are_coming());
        assert_eq!(next(&receiver), Ok(mail));
        assert_eq!(receiver.changes().are_coming(), are_coming);
    }
}

#[test]
fn the_receiver_takes_what_is_left_before_it_is_told_that_no_sender_is_left() {
    let (sender, receiver) = mailbox();
    let other = sender.clone();
    sender.send(Mail::Unpin);
    drop(sender);
    other.send(Mail::SetDisk(1));
    assert_eq!(next(&receiver), Ok(Mail::Unpin));
    drop(other);
    assert_eq!(receiver.next(None), Ok(Mail::SetDisk(1)));
    assert_eq!(receiver.next(None), Err(RecvTimeoutError::Disconnected));
    assert_eq!(next(&receiver), Err(RecvTimeoutError::Disconnected));
}

#[test]
fn a_receiver_that_waits_is_woken_by_an_entry_and_by_the_end_of_the_last_sender() {
    for timeout in [None, Some(PATIENCE)] {
        let (sender, receiver) = mailbox();
        let (ready, is_ready) = channel();
        let thread = thread::spawn(move || {
            ready.send(()).unwrap();
            [receiver.next(timeout), receiver.next(timeout)]
        });
        is_ready.recv().unwrap();
        sender.send(Mail::Unpin);
        drop(sender);
        assert_eq!(thread.join().unwrap(), [Ok(Mail::Unpin), Err(RecvTimeoutError::Disconnected)]);
    }
}

/// An entry whose answer a thread waits for.
impl Entry for Reply<()> {
    fn replaces(&self, _: &Self) -> bool {
        false
    }

    fn changes_memory(&self) -> bool {
        true
    }
}

#[test]
fn the_end_of_the_receiver_drops_what_is_left_and_what_comes_later() {
    let (sender, receiver) = mailbox();
    let send = || -> Answer<()> {
        let (reply, answer) = channel();
        sender.send(reply);
        answer
    };
    let before = send();
    assert_eq!(before.try_recv(), Err(TryRecvError::Empty));
    drop(receiver);
    let after = send();
    for answer in [before, after] {
        assert_eq!(answer.try_recv(), Err(TryRecvError::Disconnected), "nothing answers any more");
    }
}

/// What the mailbox replaced: a channel of notes, a map of the entries that are repeated, and a counter.
#[derive(Default)]
struct Model {
    notes: VecDeque<Note>,
    builds: BTreeMap<u16, u32>,
    has_unpin: bool,
    changes: usize,
}

enum Note {
    Mail(Mail),
    Build(u16),
    Unpin,
}

impl Model {
    fn send(&mut self, mail: Mail) {
        let note = match mail {
            Mail::Build(queue, id) => self.builds.insert(queue, id).is_none().then_some(Note::Build(queue)),
            Mail::Unpin => (!std::mem::replace(&mut self.has_unpin, true)).then_some(Note::Unpin),
            Mail::SetMemory(_) => {
                self.changes += 1;
                Some(Note::Mail(mail))
            }
            Mail::SetDisk(_) => Some(Note::Mail(mail)),
        };
        self.notes.extend(note);
    }

    fn next(&mut self) -> Option<Mail> {
        let mail = match self.notes.pop_front()? {
            Note::Mail(mail) => mail,
            Note::Build(queue) => Mail::Build(queue, self.builds.remove(&queue).unwrap()),
            Note::Unpin => {
                self.has_unpin = false;
                Mail::Unpin
            }
        };
        self.changes -= usize::from(mail.changes_memory());
        Some(mail)
    }
}

/// Sends an entry, or takes one (`None`).
fn any_step() -> impl Strategy<Value = Option<Mail>> {
    prop_oneof![
        3 => (0..4_u16, any::<u32>()).prop_map(|(queue, id)| Some(Mail::Build(queue, id))),
        1 => Just(Some(Mail::Unpin)),
        1 => any::<u32>().prop_map(|id| Some(Mail::SetMemory(id))),
        1 => any::<u32>().prop_map(|id| Some(Mail::SetDisk(id))),
        3 => Just(None),
    ]
}

proptest! {
    #[test]
    fn the_mailbox_does_what_a_channel_a_map_and_a_counter_do(steps in vec(any_step(), 0..100)) {
        let (sender, receiver) = mailbox();
        let mut model = Model::default();
        let takes_all = std::iter::repeat_n(None, steps.len());
        for step in steps.into_iter().chain(takes_all) {
            match step {
                Some(mail) => {
                    sender.send(mail);
                    model.send(mail);
                }
                None => prop_assert_eq!(next(&receiver).ok(), model.next()),
            }
            prop_assert_eq!(receiver.changes().are_coming(), model.changes > 0);
        }
        drop(sender);
        prop_assert_eq!(next(&receiver), Err(RecvTimeoutError::Disconnected));
    }
}
