//! The report: what follows from the facts.

use serde::Serialize;

use super::{Facts, access, limits, modes};
use crate::kernel::{Verdict, affected};

/// What this kernel and these limits allow.
///
/// Serialized, this is the output of `ringpass probe --json`: fields are only ever added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The kernel and its known holes.
    pub kernel: KernelReport,
    /// What was looked at, one by one.
    pub checks: Vec<Check>,
    /// What ringpass can offer a guest here.
    pub modes: Vec<Mode>,
    /// What else to know.
    pub notes: Vec<String>,
}

/// The kernel and its known holes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelReport {
    /// `uname -r`.
    pub release: String,
    /// The same for people, with the upstream version where `uname -r` hides it.
    pub title: String,
    /// The upstream version it was made from.
    pub upstream: String,
    /// The distributor whose kernels take fixes from later versions, so that the version does not tell them.
    pub backports_of: Option<String>,
    /// The known holes that it has by its version.
    pub holes: Vec<HoleReport>,
    /// How many holes ringpass knows of, in all kernels.
    pub known_holes: usize,
    /// `direct`, `direct-with-warning`, `mediated` or `cannot-tell`: what to give untrusted guests,
    /// by the version alone.
    pub verdict: &'static str,
    /// What to do here, in words: it counts what is missing, which the verdict does not.
    pub advice: String,
}

/// A known hole of the running kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HoleReport {
    /// Its CVE number.
    pub cve: &'static str,
    /// What goes wrong.
    pub what: &'static str,
    /// What a ring must have or use for it.
    pub reached_through: &'static str,
    /// Whether a direct ring with a built-in policy reaches it.
    pub reached_by_default: bool,
    /// The versions that have the fix, stable branches first.
    pub fixed_in: Vec<String>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name.
    pub name: &'static str,
    /// For people.
    pub title: String,
    /// How it came out.
    pub status: Status,
    /// What was seen.
    pub detail: String,
    /// Why it is missing.
    pub why: Option<String>,
    /// What to change, each line one way.
    pub change: Vec<String>,
    /// The modes that cannot do without it.
    pub needed_for: Vec<ModeName>,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// It is there.
    Ok,
    /// It is missing.
    Missing,
    /// It could not be tried, because something it builds on is missing.
    NotTried,
    /// Nothing depends on it; to know.
    Information,
}

/// One way of executing a guest's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModeName {
    /// The guest's own ring, executed by the kernel; its memory is guest RAM.
    DirectGuestRam,
    /// The guest's own ring, executed by the kernel; its memory is a window that the guest is shown.
    DirectWindow,
    /// The guest's own ring, executed by the broker.
    Mediated,
    /// A standard virtio-blk queue, executed by the broker.
    Virtqueue,
}

/// Whether a mode can be used here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mode {
    /// Which one.
    pub name: ModeName,
    /// Whether it can be used.
    pub available: bool,
    /// If not, why.
    pub why: Option<String>,
    /// If not, what to change, each line one way.
    pub change: Vec<String>,
    /// What to know about it if it can be used.
    pub notes: Vec<String>,
}

impl Report {
    /// Judges facts. Looks at nothing but them.
    pub fn judge(facts: &Facts) -> Self {
        let mut checks = access::checks(facts);
        checks.extend(limits::checks(facts));
        #[cfg(feature = "kvm")]
        checks.extend(super::machines::checks(&facts.kvm));
        let modes = modes::modes(facts, &checks);
        let mut kernel = KernelReport::judge(facts);
        let is_available = |names: &[ModeName]| modes.iter().any(|mode| mode.available && names.contains(&mode.name));
        if !is_available(&ModeName::KERNEL_EXECUTED) {
            kernel.advice = "no guest can be served here until what is missing below is there".to_owned();
        } else if facts.server.may_offer_rings && !is_available(&ModeName::DIRECT) {
            kernel.advice = "virtqueues only: direct mode is not available here, see what is missing below".to_owned();
        }
        Self { kernel, modes, checks, notes: modes::notes() }
    }

    /// The check with this name.
    pub fn check(&self, name: &str) -> Option<&Check> {
        self.checks.iter().find(|check| check.name == name)
    }

    /// Whether and why not a mode can be used.
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
    /// Something that is there.
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

    /// Turns it into something that is missing.
    pub(super) fn missing(mut self, why: impl Into<String>, change: Vec<String>) -> Self {
        self.status = Status::Missing;
        self.why = Some(why.into());
        self.change = change;
        self
    }

    /// Sets how it came out.
    pub(super) fn with_status(mut self, status: Status) -> Self {
        self.status = status;
        self
    }

    /// Says who cannot do without it.
    pub(super) fn needed_for(mut self, modes: &[ModeName]) -> Self {
        self.needed_for = modes.to_vec();
        self
    }
}

impl ModeName {
    /// Both placements of direct mode.
    pub(super) const DIRECT: [Self; 2] = [Self::DirectGuestRam, Self::DirectWindow];

    /// All that have io_uring do the I/O, which is every mode that is built.
    pub(super) const KERNEL_EXECUTED: [Self; 3] = [Self::DirectGuestRam, Self::DirectWindow, Self::Virtqueue];

    /// For people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::DirectGuestRam => "direct, rings in guest RAM",
            Self::DirectWindow => "direct, rings in a window",
            Self::Mediated => "mediated",
            Self::Virtqueue => "virtqueue",
        }
    }
}
