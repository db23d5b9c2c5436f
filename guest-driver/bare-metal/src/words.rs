//! Plain data as a sequence of words: shared memory contains only integers.

/// Number of words of a mailbox in each direction.
pub const MAILBOX_WORDS: usize = 128;

/// The content of a mailbox.
pub type Words = [u64; MAILBOX_WORDS];

/// Writes values to a mailbox, one word each.
pub(crate) struct Writer {
    words: Words,
    used: usize,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self { words: [0; MAILBOX_WORDS], used: 0 }
    }

    pub(crate) fn put(&mut self, value: impl Into<u64>) {
        self.words[self.used] = value.into();
        self.used += 1;
    }

    pub(crate) fn finish(self) -> Words {
        self.words
    }
}

/// Reads values from a mailbox in the same order.
pub(crate) struct Reader<'a>(pub(crate) core::slice::Iter<'a, u64>);

impl Reader<'_> {
    /// The next word; 0 after the end.
    pub(crate) fn take(&mut self) -> u64 {
        self.0.next().copied().unwrap_or(0)
    }

    /// The next word as a `bool`; `None` if it is neither 0 nor 1.
    pub(crate) fn take_bool(&mut self) -> Option<bool> {
        match self.take() {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    /// The next word as a `u32`; `None` if it is too large.
    pub(crate) fn take_u32(&mut self) -> Option<u32> {
        u32::try_from(self.take()).ok()
    }
}
