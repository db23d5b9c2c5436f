//! The report: the conclusions from the facts.

use serde::Serialize;

use super::{Check, Facts, Mode, ModeName, access, limits, modes};
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
