//! Common parts of the fuzz targets' bodies.
//!
//! A body takes bytes, makes choices by them, and panics if a property does not hold. It runs in three ways: by a
//! fuzzer (`fuzz/`), as a property test, and with the inputs that tests save as seeds.

/// Choices made by bytes; when the bytes are used up, always the first choice.
pub(crate) struct Choices<'a> {
    bytes: &'a [u8],
}

impl<'a> Choices<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Whether all bytes are used up.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        match self.bytes.split_first() {
            Some((&first, rest)) => {
                self.bytes = rest;
                first
            }
            None => 0,
        }
    }

    /// A number below `end`, which is 1 to 256.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    /// Any number.
    pub(crate) fn number(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }
}

/// Saves an input from which a fuzzer starts, in the directory that `cargo xtask` names in `RINGPASS_FUZZ_SEEDS`.
/// Without that variable it does nothing.
#[cfg(test)]
pub(crate) fn save_seed(target: &str, name: &str, bytes: &[u8]) {
    let Some(directory) = std::env::var_os("RINGPASS_FUZZ_SEEDS") else { return };
    let directory = std::path::Path::new(&directory).join(target);
    std::fs::create_dir_all(&directory).expect("a directory for the seeds");
    std::fs::write(directory.join(name), bytes).expect("a file for the seed");
}
