//! Version numbers of upstream kernels, ordered.

use std::fmt;

/// A version of the upstream kernel. Release candidates come before their release: 7.2-rc3 < 7.2 = 7.2.0 < 7.2.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelVersion {
    /// 6 of 6.18.44.
    pub major: u16,
    /// 18 of 6.18.44.
    pub minor: u16,
    /// 44 of 6.18.44; 0 of 6.18.
    pub patch: u16,
    /// Whether the version was released.
    pub stage: Stage,
}

/// The stage of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// A release candidate: 3 of 7.2-rc3.
    Candidate(u8),
    /// A release.
    Released,
}

impl KernelVersion {
    /// The release `major.minor.patch`; `patch` is 0 for the first of a branch.
    pub const fn released(major: u16, minor: u16, patch: u16) -> Self {
        Self { major, minor, patch, stage: Stage::Released }
    }

    /// Release candidate `number` of `major.minor`.
    pub const fn candidate(major: u16, minor: u16, number: u8) -> Self {
        Self { major, minor, patch: 0, stage: Stage::Candidate(number) }
    }

    /// Reads the version at the start of `text`, as in `6.18.44-fc-v595`, `6.12+deb13-amd64` or `7.2.0-rc3`, and
    /// returns it with the rest of the text. `None` unless there are at least two numbers.
    pub(super) fn read(text: &str) -> Option<(Self, &str)> {
        let (major, rest) = number(text)?;
        let (minor, rest) = number(rest.strip_prefix('.')?)?;
        let (patch, rest) = match rest.strip_prefix('.').and_then(number) {
            Some((patch, rest)) => (patch, rest),
            None => (0, rest),
        };
        match rest.strip_prefix("-rc").and_then(number) {
            Some((candidate, rest)) => {
                let stage = Stage::Candidate(u8::try_from(candidate).ok()?);
                Some((Self { major, minor, patch, stage }, rest))
            }
            None => Some((Self::released(major, minor, patch), rest)),
        }
    }

    /// Whether both belong to one stable branch, as 6.18.2 and 6.18.44 do.
    pub const fn same_branch(self, other: Self) -> bool {
        self.major == other.major && self.minor == other.minor
    }
}

fn number(text: &str) -> Option<(u16, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    Some((digits.parse().ok()?, rest))
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.patch != 0 {
            write!(f, ".{}", self.patch)?;
        }
        match self.stage {
            Stage::Candidate(number) => write!(f, "-rc{number}"),
            Stage::Released => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> KernelVersion {
        KernelVersion::read(text).unwrap().0
    }

    #[test]
    fn the_number_at_the_start_of_a_release_is_read() {
        assert_eq!(KernelVersion::read("6.18.44-fc-v595"), Some((KernelVersion::released(6, 18, 44), "-fc-v595")));
        assert_eq!(KernelVersion::read("6.12+deb13-amd64"), Some((KernelVersion::released(6, 12, 0), "+deb13-amd64")));
        assert_eq!(KernelVersion::read("7.2.0-rc3+"), Some((KernelVersion::candidate(7, 2, 3), "+")));
        assert_eq!(KernelVersion::read("7.1-rc4"), Some((KernelVersion::candidate(7, 1, 4), "")));
        assert_eq!(KernelVersion::read("5.15.153.1-microsoft").unwrap().1, ".1-microsoft");
    }

    #[test]
    fn text_without_two_numbers_is_no_version() {
        for text in ["", "linux", "6", "6.", "6.x", ".6.1", "99999999.1", "6-12"] {
            assert_eq!(KernelVersion::read(text), None, "{text}");
        }
    }

    #[test]
    fn candidates_come_before_their_release() {
        assert!(read("7.2-rc3") < read("7.2-rc10"));
        assert!(read("7.2-rc10") < read("7.2"));
        assert!(read("7.1.99") < read("7.2-rc1"));
        assert_eq!(read("7.2"), read("7.2.0"));
        assert!(read("6.9.1") < read("6.18.0"));
    }

    #[test]
    fn versions_are_shown_as_the_kernel_writes_them() {
        for text in ["6.18.44", "7.2", "7.2-rc3"] {
            assert_eq!(read(text).to_string(), text);
        }
    }
}
