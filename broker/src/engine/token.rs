//! What a completion is about: the `user_data` of a ring's entries.

/// What a completion is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The request in this slot.
    Request(u32),
    /// A queue's kick eventfd. The generation tells this eventfd from earlier ones.
    Kick {
        /// The worker's number of the queue.
        queue: u16,
        /// Counts the queue's kick eventfds.
        generation: u32,
    },
    /// The worker's commands.
    Commands,
    /// The kernel has let go of the disk that the ring had as its fixed file.
    DiskReleased,
    /// The worker's timer.
    Timer,
    /// The worker does not wait for it.
    Nothing,
}

// The upper 16 bits tell the kind; requests have zero there, and so are the cheapest.
const KIND_SHIFT: u32 = 48;
const KICK: u64 = 1;
const COMMANDS: u64 = 2;
const NOTHING: u64 = 3;
const DISK_RELEASED: u64 = 4;
const TIMER: u64 = 5;

impl Token {
    /// As the ring takes it.
    #[inline]
    pub(super) fn to_user_data(self) -> u64 {
        match self {
            Self::Request(slot) => slot.into(),
            Self::Kick { queue, generation } => KICK << KIND_SHIFT | u64::from(generation) << 16 | u64::from(queue),
            Self::Commands => COMMANDS << KIND_SHIFT,
            Self::DiskReleased => DISK_RELEASED << KIND_SHIFT,
            Self::Timer => TIMER << KIND_SHIFT,
            Self::Nothing => NOTHING << KIND_SHIFT,
        }
    }

    /// From what the ring gives back, which is what it was given.
    #[inline]
    pub(super) fn from_user_data(user_data: u64) -> Self {
        match user_data >> KIND_SHIFT {
            0 => Self::Request(user_data as u32),
            KICK => Self::Kick { queue: user_data as u16, generation: (user_data >> 16) as u32 },
            COMMANDS => Self::Commands,
            DISK_RELEASED => Self::DiskReleased,
            TIMER => Self::Timer,
            _ => Self::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_as_they_were_given() {
        let kick = |queue, generation| Token::Kick { queue, generation };
        for token in [
            Token::Request(0),
            Token::Request(u32::MAX),
            kick(0, 0),
            kick(u16::MAX, 1),
            kick(3, u32::MAX),
            Token::Commands,
            Token::DiskReleased,
            Token::Timer,
            Token::Nothing,
        ] {
            assert_eq!(Token::from_user_data(token.to_user_data()), token);
        }
    }
}
