//! One check of the report.

use serde::Serialize;

use super::ModeName;

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// Stable name.
    pub name: &'static str,
    /// Title, for people.
    pub title: String,
    /// The result.
    pub status: Status,
    /// The observation.
    pub detail: String,
    /// Why the ability is missing.
    pub why: Option<String>,
    /// What to change; each line is an alternative.
    pub change: Vec<String>,
    /// The modes that need the ability.
    pub needed_for: Vec<ModeName>,
}

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// The ability is available.
    Ok,
    /// The ability is missing.
    Missing,
    /// The ability could not be tried, because it builds on something that is missing.
    NotTried,
    /// For information only; no mode depends on it.
    Information,
}

impl Check {
    /// A check of an available ability.
    pub(super) fn ok(name: &'static str, title: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            name,
            title: title.into(),
            status: Status::Ok,
            detail: detail.into(),
            why: None,
            change: Vec::new(),
            needed_for: Vec::new(),
        }
    }

    /// Marks the ability as missing.
    pub(super) fn missing(mut self, why: impl Into<String>, change: Vec<String>) -> Self {
        self.status = Status::Missing;
        self.why = Some(why.into());
        self.change = change;
        self
    }

    /// Sets the result.
    pub(super) fn with_status(mut self, status: Status) -> Self {
        self.status = status;
        self
    }

    /// Sets the modes that need the ability.
    pub(super) fn needed_for(mut self, modes: &[ModeName]) -> Self {
        self.needed_for = modes.to_vec();
        self
    }
}
