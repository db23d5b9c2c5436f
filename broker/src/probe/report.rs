//! The report: the conclusions from the facts.

use serde::Serialize;

use super::{Facts, access, limits, modes};
use crate::kernel::{Verdict, affected};

/// What this kernel and these limits allow.
///
/// Serialized, this is the output of `ringpass probe --json`: later versions only add fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The kernel and its known holes.
    pub kernel: KernelReport,
    /// The checks, one by one.
    pub checks: Vec<Check>,
    /// The modes that ringpass can offer a guest here.
    pub modes: Vec<Mode>,
    /// Further notes.
    pub notes: Vec<String>,
}

/// The kernel and its known holes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KernelReport {
    /// `uname -r`.
    pub release: String,
    /// The release for people, with the upstream version where `uname -r` hides it.
    pub title: String,
    /// The upstream version on which the kernel is based.
    pub upstream: String,
    /// The distributor whose kernels backport fixes from later versions, so that the version does not tell which fixes
    /// they have.
    pub backports_of: Option<String>,
    /// The known holes of the kernel, by its version.
    pub holes: Vec<HoleReport>,
    /// The number of holes that ringpass knows, in all kernels.
    pub known_holes: usize,
    /// `direct`, `direct-with-warning`, `mediated` or `cannot-tell`: the mode for untrusted guests,
    /// by the version alone.
    pub verdict: &'static str,
    /// What to do here, in words: unlike the verdict, the advice takes into account what is missing.
    pub advice: String,
}

/// A known hole of the running kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct HoleReport {
    /// Its CVE number.
    pub cve: &'static str,
    /// What goes wrong.
    pub what: &'static str,
    /// What a ring must have or use to reach the hole.
    pub reached_through: &'static str,
    /// Whether a direct ring with a built-in policy reaches it.
    pub reached_by_default: bool,
    /// The versions that have the fix, stable branches first.
    pub fixed_in: Vec<String>,
}

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

/// One way of executing a guest's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ModeName {
    /// The guest's own ring, executed by the kernel; its memory is guest RAM.
    DirectGuestRam,
    /// The guest's own ring, executed by the kernel; its memory is a window that the embedder shows to the guest.
    DirectWindow,
    /// The guest's own ring, executed by the broker.
    Mediated,
    /// A standard virtio-blk queue, executed by the broker.
    Virtqueue,
}

/// Whether a mode can be used here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Mode {
    /// The name of the mode.
    pub name: ModeName,
    /// Whether the mode can be used.
    pub available: bool,
    /// If not, why.
    pub why: Option<String>,
    /// If not, what to change; each line is an alternative.
    pub change: Vec<String>,
    /// If so, what to know about it.
    pub notes: Vec<String>,
}

impl Report {
    /// Judges facts. Looks at nothing else.
    pub fn judge(facts: &Facts) -> Self {
        let mut checks = access::checks(facts);
        checks.extend(limits::checks(facts));
        #[cfg(feature = "kvm")]
        checks.extend(super::machines::checks(&facts.kvm));
        let modes = modes::modes(facts, &checks);
        let mut kernel = KernelReport::judge(facts);
        let is_available = |names: &[ModeName]| modes.iter().any(|mode| mode.available && names.contains(&mode.name));
        if !is_available(&ModeName::KERNEL_EXECUTED) {
            kernel.advice = "no guest can be served here until what is missing below is available".to_owned();
        } else if facts.server.may_offer_rings && !is_available(&ModeName::DIRECT) {
            kernel.advice = "virtqueues only: direct mode is not available here, see what is missing below".to_owned();
        }
        Self { kernel, modes, checks, notes: modes::notes() }
    }

    /// The check with this name.
    pub fn check(&self, name: &str) -> Option<&Check> {
        self.checks.iter().find(|check| check.name == name)
    }

    /// The mode with this name, with the reason if it cannot be used.
    pub fn mode(&self, name: ModeName) -> Option<&Mode> {
        self.modes.iter().find(|mode| mode.name == name)
    }

    /// Whether any mode can be used.
    pub fn any_mode_available(&self) -> bool {
        self.modes.iter().any(|mode| mode.available)
    }
}

impl KernelReport {
    fn judge(facts: &Facts) -> Self {
        let kernel = &facts.kernel;
        let holes = affected(kernel).into_iter().map(|hole| HoleReport {
            cve: hole.cve,
            what: hole.what,
            reached_through: hole.reach.description(),
            reached_by_default: hole.reach.is_default(),
            fixed_in: hole.fixed_in_branches.iter().chain([&hole.fixed]).map(ToString::to_string).collect(),
        });
        let verdict = kernel.verdict();
        Self {
            release: kernel.release().to_owned(),
            title: kernel.to_string(),
            upstream: kernel.upstream().to_string(),
            backports_of: kernel.backports_of().map(str::to_owned),
            holes: holes.collect(),
            known_holes: crate::kernel::known_holes().len(),
            verdict: match verdict {
                Verdict::DirectByDefault => "direct",
                Verdict::DirectWithWarning => "direct-with-warning",
                Verdict::MediatedByDefault => "mediated",
                Verdict::CannotTell { .. } => "cannot-tell",
            },
            advice: verdict.advice(),
        }
    }
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

impl ModeName {
    /// Both placements of direct mode.
    pub(super) const DIRECT: [Self; 2] = [Self::DirectGuestRam, Self::DirectWindow];

    /// All modes in which io_uring does the I/O, which are all modes that are built.
    pub(super) const KERNEL_EXECUTED: [Self; 3] = [Self::DirectGuestRam, Self::DirectWindow, Self::Virtqueue];

    /// Title, for people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::DirectGuestRam => "direct, rings in guest RAM",
            Self::DirectWindow => "direct, rings in a window",
            Self::Mediated => "mediated",
            Self::Virtqueue => "virtqueue",
        }
    }
}
