//! The modes that ringpass can offer a guest here.

use serde::Serialize;

use super::{Check, Facts, ModeName, Status, limits};
use crate::kernel::Verdict;

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

/// All modes, the fastest first.
pub(super) fn modes(facts: &Facts, checks: &[Check]) -> Vec<Mode> {
    let [guest_ram, window] = ModeName::DIRECT.map(|name| judge(name, facts, checks));
    vec![guest_ram, window, not_built(ModeName::Mediated), judge(ModeName::Virtqueue, facts, checks)]
}

fn judge(name: ModeName, facts: &Facts, checks: &[Check]) -> Mode {
    let needed: Vec<&Check> = checks.iter().filter(|check| check.needed_for.contains(&name)).collect();
    let missing: Vec<&&Check> = needed.iter().filter(|check| check.status == Status::Missing).collect();
    // Something that could not be tried builds on something that is missing, and the missing part gives the reason.
    let available = needed.iter().all(|check| check.status == Status::Ok);
    if available {
        // The notes hold for a guest's own ring; a virtqueue pins nothing and gives the guest no part of the kernel.
        let is_direct = ModeName::DIRECT.contains(&name);
        let notes = default_note(facts.kernel.verdict()).into_iter().chain(limits::note(facts));
        let notes = if is_direct { notes.collect() } else { Vec::new() };
        return Mode { name, available, why: None, change: Vec::new(), notes };
    }
    let reasons: Vec<String> =
        missing.iter().map(|check| format!("{}: {}", check.title, check.why.as_deref().unwrap_or("missing"))).collect();
    let mut change: Vec<String> = Vec::new();
    for line in missing.iter().flat_map(|check| &check.change) {
        if !change.contains(line) {
            change.push(line.clone());
        }
    }
    let why = if reasons.is_empty() { "it could not be tried".to_owned() } else { reasons.join("; ") };
    Mode { name, available, why: Some(why), change, notes: Vec::new() }
}

fn default_note(verdict: Verdict) -> Option<String> {
    (verdict != Verdict::DirectByDefault).then(|| format!("by the kernel's version: {}", verdict.advice()))
}

fn not_built(name: ModeName) -> Mode {
    Mode {
        name,
        available: false,
        why: Some(format!("this version of ringpass ({}) does not have it yet", env!("CARGO_PKG_VERSION"))),
        change: vec!["use direct mode, or a later version of ringpass".to_owned()],
        notes: Vec::new(),
    }
}

/// The notes that hold on every machine.
pub(super) fn notes() -> Vec<String> {
    [
        "Direct mode pins all of a guest's RAM. It is for guests without a balloon, free page reporting, virtio-mem and \
         postcopy migration: these discard pages that the ring continues to use, and the guest silently loses data.",
        "Guest RAM must be a memfd, or a file on tmpfs or hugetlbfs: the kernel does not pin other files.",
    ]
    .map(str::to_owned)
    .to_vec()
}
