//! Randomness that can be replayed: every random choice of a test comes from one seed, and the seed is printed.

use std::{
    env, fmt,
    hash::{DefaultHasher, Hash, Hasher},
};

/// Environment variable: the seed to use, decimal or `0x` hexadecimal.
pub const VARIABLE: &str = "RINGPASS_SEED";

/// A seed of 64 bits. A failed test prints it; `RINGPASS_SEED=<it>` runs the same choices again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seed(u64);

impl Seed {
    /// The seed in `RINGPASS_SEED`, else a random one. Prints it to stderr, so that it stands in a failed test's output.
    ///
    /// # Panics
    ///
    /// `RINGPASS_SEED` is set and not a number: a replay with another seed would only look like one.
    pub fn from_env_or_random() -> Self {
        let seed = match env::var(VARIABLE) {
            Ok(text) => Self::parse(&text).unwrap_or_else(|| {
                panic!("{VARIABLE}={text:?} is not a seed: give a number below 2^64, decimal or 0x hexadecimal")
            }),
            Err(env::VarError::NotPresent) => Self(fastrand::u64(..)),
            Err(error @ env::VarError::NotUnicode(_)) => panic!("{VARIABLE}: {error}"),
        };
        eprintln!("{seed}");
        seed
    }

    /// A seed fixed in the code: for choices that are to be the same in every run, such as the rows of a matrix.
    pub const fn fixed(seed: u64) -> Self {
        Self(seed)
    }

    /// The number itself, for a guest or a child process that makes its own choices.
    pub const fn value(self) -> u64 {
        self.0
    }

    /// A generator of random numbers. Two from the same seed give the same numbers.
    pub fn rng(self) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.0)
    }

    /// Derives a seed for one part of a test (a thread, a row). A part makes the same choices even if another part
    /// makes more.
    pub fn derive(self, part: impl Hash) -> Self {
        // `DefaultHasher::new` has fixed keys: the same in every run of one toolchain, which is what a replay needs.
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        part.hash(&mut hasher);
        Self(hasher.finish())
    }

    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        }
        .map(Self)
    }
}

/// Displays as the assignment that replays it.
impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{VARIABLE}={:#018x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_seed_parses_to_itself() {
        for value in [0, 1, 0xdead_beef, u64::MAX] {
            let printed = Seed(value).to_string();
            let assigned = printed.strip_prefix("RINGPASS_SEED=").expect("an assignment");
            assert_eq!(Seed::parse(assigned), Some(Seed(value)));
            assert_eq!(Seed::parse(&value.to_string()), Some(Seed(value)));
        }
    }

    #[test]
    fn only_a_number_is_a_seed() {
        for text in ["", "0x", "12 34", "-1", "18446744073709551616", "seed"] {
            assert_eq!(Seed::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_numbers_again_and_its_parts_give_others() {
        let numbers = |seed: Seed| {
            let mut rng = seed.rng();
            [rng.u64(..), rng.u64(..), rng.u64(..)]
        };
        let seed = Seed::fixed(7);
        assert_eq!(numbers(seed), numbers(Seed::fixed(7)));
        assert_eq!(seed.derive("thread 1"), seed.derive("thread 1"));
        assert_ne!(numbers(seed.derive("thread 1")), numbers(seed.derive("thread 2")));
        assert_ne!(numbers(seed.derive("thread 1")), numbers(seed));
    }
}
