//! The findings of lint that a policy may accept.

use core::fmt;

use bitflags::bitflags;

bitflags! {
    /// The errors of lint that a policy accepts.
    ///
    /// A policy can accept only what costs the host time and memory, or the guest its own ring. It cannot accept that
    /// a guest escapes: that needs [`CompiledPolicy::accept_unsafe`](crate::CompiledPolicy::accept_unsafe), which the
    /// embedder calls and no policy file can.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Accepted: u8 {
        /// [`Lint::OrderedRequests`](crate::Lint::OrderedRequests).
        const ORDERED_REQUESTS = 1 << 0;
        /// [`Lint::UnboundedWork`](crate::Lint::UnboundedWork).
        const UNBOUNDED_WORK = 1 << 1;
        /// [`Lint::AsyncFlag`](crate::Lint::AsyncFlag).
        const ASYNC_FLAG = 1 << 2;
        /// [`Lint::CompletionFlood`](crate::Lint::CompletionFlood).
        const COMPLETION_FLOOD = 1 << 3;
    }
}

/// The flags with the names of their lints.
const NAMES: [(Accepted, &str); 4] = [
    (Accepted::ORDERED_REQUESTS, "ordered-requests"),
    (Accepted::UNBOUNDED_WORK, "unbounded-work"),
    (Accepted::ASYNC_FLAG, "async-flag"),
    (Accepted::COMPLETION_FLOOD, "completion-flood"),
];

impl Accepted {
    /// The names of the lints in this set, in the order of the flags.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.into_iter().filter(move |(flag, _)| self.contains(*flag)).map(|(_, name)| name)
    }

    /// The set of only the lint with this name; `None` for other lints, which a policy cannot accept.
    #[must_use]
    pub fn from_lint_name(name: &str) -> Option<Self> {
        NAMES.into_iter().find(|(_, known)| *known == name).map(|(flag, _)| flag)
    }
}

/// The names of the lints, separated by commas; "nothing" for an empty set.
impl fmt::Display for Accepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing");
        }
        let mut separator = "";
        for name in self.names() {
            write!(f, "{separator}{name}")?;
            separator = ", ";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lint;

    #[test]
    fn every_flag_has_the_name_of_a_lint() {
        assert_eq!(Accepted::all().iter().count(), NAMES.len());
        for (flag, name) in NAMES {
            assert!(Lint::ALL.iter().any(|lint| lint.name() == name && lint.acceptance() == Some(flag)), "{name}");
            assert_eq!(Accepted::from_lint_name(name), Some(flag));
        }
        let acceptable = Lint::ALL.iter().filter(|lint| lint.acceptance().is_some()).count();
        assert_eq!(acceptable, NAMES.len());
    }

    #[test]
    fn a_way_to_escape_cannot_be_accepted() {
        for name in ["raw-addresses", "no-fixed-file", "files-outside-table", "nop", "ORDERED_REQUESTS", ""] {
            assert_eq!(Accepted::from_lint_name(name), None, "{name}");
        }
    }

    #[test]
    fn accepted_findings_are_displayed_by_name() {
        assert_eq!(Accepted::empty().to_string(), "nothing");
        assert_eq!((Accepted::ASYNC_FLAG | Accepted::ORDERED_REQUESTS).to_string(), "ordered-requests, async-flag");
    }
}
