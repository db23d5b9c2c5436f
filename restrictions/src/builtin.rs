//! The policies that ship with this crate.

use crate::policy::{Access, Policy};

/// A policy that ships with this crate, as a value and as a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BuiltIn {
    /// [`Policy::direct`].
    Direct(Access),
    /// [`Policy::mediated`].
    Mediated(Access),
}

impl BuiltIn {
    /// All built-in policies.
    pub const ALL: [Self; 4] = [
        Self::Direct(Access::ReadWrite),
        Self::Direct(Access::ReadOnly),
        Self::Mediated(Access::ReadWrite),
        Self::Mediated(Access::ReadOnly),
    ];

    /// The built-in policy of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|built_in| built_in.name() == name)
    }

    /// The name, for example `direct-read-write`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct(Access::ReadWrite) => "direct-read-write",
            Self::Direct(Access::ReadOnly) => "direct-read-only",
            Self::Mediated(Access::ReadWrite) => "mediated-read-write",
            Self::Mediated(Access::ReadOnly) => "mediated-read-only",
        }
    }

    /// The policy.
    #[must_use]
    pub fn policy(self) -> Policy {
        match self {
            Self::Direct(access) => Policy::direct(access),
            Self::Mediated(access) => Policy::mediated(access),
        }
    }

    /// The policy as a file, which can serve as a start for another policy.
    #[must_use]
    pub const fn file(self) -> &'static str {
        match self {
            Self::Direct(Access::ReadWrite) => include_str!("../policies/direct-read-write.toml"),
            Self::Direct(Access::ReadOnly) => include_str!("../policies/direct-read-only.toml"),
            Self::Mediated(Access::ReadWrite) => include_str!("../policies/mediated-read-write.toml"),
            Self::Mediated(Access::ReadOnly) => include_str!("../policies/mediated-read-only.toml"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "files")]
    #[test]
    fn every_built_in_policy_equals_its_file() {
        for built_in in BuiltIn::ALL {
            let file =
                crate::PolicyFile::parse(built_in.file()).unwrap_or_else(|error| panic!("{built_in:?}: {error}"));
            assert_eq!(file.policy, built_in.policy(), "{built_in:?}");
            assert_eq!(file.name.as_deref(), Some(built_in.name()));
            assert!(file.description.is_some());
        }
    }

    #[test]
    fn a_built_in_policy_is_found_by_its_name_only() {
        for built_in in BuiltIn::ALL {
            assert_eq!(BuiltIn::from_name(built_in.name()), Some(built_in));
        }
        assert_eq!(BuiltIn::from_name("direct"), None);
    }
}
