//! The advice drawn from a kernel's version: whether a hostile guest may have a ring on it.

use super::{release::KernelRelease, version::KernelVersion};

/// Whether direct mode is suitable for untrusted guests on a kernel of this release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Direct mode by default: 6.18.40 and later of 6.18, 7.1.5 and later of 7.1, 7.2 and later.
    DirectByDefault,
    /// Direct mode with a warning: the known holes are closed, but the branch gets fixes late (6.12.97 and later of
    /// 6.12, 6.6.145 and later of 6.6).
    DirectWithWarning,
    /// Mediated mode by default; direct mode only for guests that are trusted with the host.
    MediatedByDefault,
    /// The version is inconclusive: the distributor backports fixes from later versions. Mediated mode by default.
    CannotTell {
        /// The distributor.
        vendor: &'static str,
    },
}

/// The first advised release of each stable branch.
const DIRECT_FROM: &[KernelVersion] = &[KernelVersion::released(6, 18, 40), KernelVersion::released(7, 1, 5)];
/// All versions from this one on are advised.
const DIRECT_ALWAYS_FROM: KernelVersion = KernelVersion::released(7, 2, 0);
/// The first release of each stable branch that is advised with a warning.
const WARN_FROM: &[KernelVersion] = &[KernelVersion::released(6, 6, 145), KernelVersion::released(6, 12, 97)];

impl KernelRelease {
    /// Whether direct mode is suitable for untrusted guests on this kernel.
    pub fn verdict(&self) -> Verdict {
        if let Some(vendor) = self.backports_of() {
            return Verdict::CannotTell { vendor };
        }
        let version = self.upstream();
        let reached =
            |branches: &[KernelVersion]| branches.iter().any(|&from| version.same_branch(from) && version >= from);
        if version >= DIRECT_ALWAYS_FROM || reached(DIRECT_FROM) {
            Verdict::DirectByDefault
        } else if reached(WARN_FROM) {
            Verdict::DirectWithWarning
        } else {
            Verdict::MediatedByDefault
        }
    }
}

impl Verdict {
    /// The advice in words.
    pub fn advice(self) -> String {
        const NEWER: &str = "Linux 6.18.40 or later of 6.18, 7.1.5 or later of 7.1, or 7.2 or later";
        match self {
            Self::DirectByDefault => "direct mode by default".to_owned(),
            Self::DirectWithWarning => format!(
                "direct mode with a warning: the known holes are closed, but fixes reach this branch late; better is \
                 {NEWER}"
            ),
            Self::MediatedByDefault => {
                format!("direct mode only for guests that are trusted with the host; for others use {NEWER}")
            }
            Self::CannotTell { vendor } => format!(
                "direct mode only for guests that are trusted with the host, unless {vendor} says that the listed \
                 holes are closed: its kernels take fixes from later versions, so the version is inconclusive; or \
                 use {NEWER}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::affected;

    fn verdict(release: &str) -> Verdict {
        KernelRelease::parse(release, "#1 SMP", None).unwrap().verdict()
    }

    #[test]
    fn direct_mode_is_the_default_from_the_first_good_release_of_each_branch() {
        for release in ["6.18.40", "6.18.44-fc-v595", "7.1.5", "7.1.20", "7.2", "7.2.1", "8.0"] {
            assert_eq!(verdict(release), Verdict::DirectByDefault, "{release}");
        }
        for release in ["6.18.39", "7.0.20", "7.1.4", "7.2-rc7", "6.19.14", "6.17.13", "5.15.300", "6.1.300"] {
            assert_eq!(verdict(release), Verdict::MediatedByDefault, "{release}");
        }
    }

    #[test]
    fn older_branches_are_advised_with_a_warning_once_the_known_holes_are_closed() {
        for release in ["6.12.97", "6.12.120", "6.6.145", "6.6.200"] {
            assert_eq!(verdict(release), Verdict::DirectWithWarning, "{release}");
        }
        for release in ["6.12.96", "6.6.144"] {
            assert_eq!(verdict(release), Verdict::MediatedByDefault, "{release}");
        }
    }

    #[test]
    fn an_inconclusive_version_is_not_trusted() {
        let verdict = verdict("6.18.50-1.el10.x86_64");
        assert_eq!(verdict, Verdict::CannotTell { vendor: "Red Hat" });
        assert!(verdict.advice().contains("unless Red Hat says that the listed holes are closed"));
    }

    #[test]
    fn no_kernel_with_a_known_hole_is_advised() {
        for release in DIRECT_FROM.iter().chain(WARN_FROM).chain([&DIRECT_ALWAYS_FROM]) {
            let release = KernelRelease::parse(&format!("{release}"), "#1 SMP", None).unwrap();
            assert_ne!(release.verdict(), Verdict::MediatedByDefault);
            assert_eq!(affected(&release), Vec::<&crate::kernel::Hole>::new(), "{release:?}");
        }
    }
}
