//! What the lint of a policy should know of a kernel.

use ringpass_restrictions::{LintContext, Mode, NopHole, RestrictionSemantics};

use super::{KernelRelease, Reach, affected};

/// The lint context for a ring of the running kernel.
pub fn lint_context(mode: Mode, semantics: RestrictionSemantics) -> LintContext {
    let nop = KernelRelease::running().map_or(NopHole::Unknown, |release| nop_hole(&release));
    LintContext::new(mode, Some(semantics)).nop(nop)
}

/// Whether a kernel has the hole of `NOP`, by its version. Unknown for a distributor that backports fixes from later
/// versions.
pub fn nop_hole(release: &KernelRelease) -> NopHole {
    let is_open = affected(release).iter().any(|hole| hole.reach == Reach::NopOperation);
    match (is_open, release.backports_of()) {
        (false, _) => NopHole::Closed,
        (true, None) => NopHole::Open,
        (true, Some(_)) => NopHole::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nop_hole_is_judged_by_the_kernel_version() {
        let hole = |release| nop_hole(&KernelRelease::parse(release, "#1 SMP", None).unwrap());
        assert_eq!(hole("6.12.0"), NopHole::Closed, "before it came");
        assert_eq!(hole("6.18.38"), NopHole::Open);
        assert_eq!(hole("6.18.39"), NopHole::Closed);
    }
}
