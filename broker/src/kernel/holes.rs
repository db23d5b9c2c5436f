//! Known security holes of Linux that a guest's ring could reach.
//!
//! Versions are those of the CVE records (the kernel's own CNA, and Red Hat for the two from 2023).

use super::{release::KernelRelease, version::KernelVersion};

/// A known hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hole {
    /// Its CVE number.
    pub cve: &'static str,
    /// What goes wrong, and where.
    pub what: &'static str,
    /// What a ring must have or use to reach the hole.
    pub reach: Reach,
    /// The first release that has it.
    pub since: KernelVersion,
    /// For each stable branch that got the fix, the first release without the hole.
    pub fixed_in_branches: &'static [KernelVersion],
    /// The first upstream version without the hole; all later versions are fixed.
    pub fixed: KernelVersion,
}

/// What a ring must have or use for a hole to be reachable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reach {
    /// Fixed buffers: every direct ring.
    FixedBuffers,
    /// A ring in guest RAM (`IORING_SETUP_NO_MMAP`).
    RingsInGuestRam,
    /// I/O that blocks and goes to an io-wq worker: every direct ring.
    IoWorkers,
    /// A registered completion eventfd: every direct ring with interrupts.
    CompletionEventfd,
    /// The operation `IORING_OP_NOP`, which the built-in policies do not allow.
    NopOperation,
    /// A KVM ioeventfd with datamatch, which ringpass does not use; other devices of the VM may.
    IoeventfdDatamatch,
}

impl Reach {
    /// Whether a guest reaches the hole through a direct ring with a built-in policy.
    pub const fn is_default(self) -> bool {
        !matches!(self, Self::NopOperation | Self::IoeventfdDatamatch)
    }

    /// The words that follow "reached through".
    pub const fn description(self) -> &'static str {
        match self {
            Self::FixedBuffers => "fixed buffers, which every direct ring has",
            Self::RingsInGuestRam => "rings in guest RAM (NO_MMAP)",
            Self::IoWorkers => "I/O that goes to an io-wq worker, on any direct ring",
            Self::CompletionEventfd => "the completion eventfd",
            Self::NopOperation => "IORING_OP_NOP, which the built-in policies do not allow",
            Self::IoeventfdDatamatch => "a KVM ioeventfd with datamatch, which ringpass does not use",
        }
    }
}

const fn v(major: u16, minor: u16, patch: u16) -> KernelVersion {
    KernelVersion::released(major, minor, patch)
}

const fn rc(major: u16, minor: u16, number: u8) -> KernelVersion {
    KernelVersion::candidate(major, minor, number)
}

const KNOWN: &[Hole] = &[
    Hole {
        cve: "CVE-2023-2598",
        what: "registering a fixed buffer in compound pages gives access to memory beyond it",
        reach: Reach::FixedBuffers,
        since: rc(6, 3, 1),
        fixed_in_branches: &[],
        fixed: rc(6, 4, 1),
    },
    Hole {
        cve: "CVE-2023-6560",
        what: "ring memory of several pages that are not contiguous is accessed out of bounds",
        reach: Reach::RingsInGuestRam,
        since: v(6, 5, 0),
        fixed_in_branches: &[v(6, 6, 23)],
        fixed: rc(6, 7, 5),
    },
    Hole {
        cve: "CVE-2024-35831",
        what: "pinned pages are not released when ring memory is refused",
        reach: Reach::RingsInGuestRam,
        since: v(6, 6, 0),
        fixed_in_branches: &[v(6, 6, 23), v(6, 7, 11), v(6, 8, 2)],
        fixed: v(6, 9, 0),
    },
    Hole {
        cve: "CVE-2025-21655",
        what: "a completion eventfd is freed while it is still in use",
        reach: Reach::CompletionEventfd,
        since: v(6, 1, 0),
        fixed_in_branches: &[v(6, 1, 125), v(6, 6, 72), v(6, 12, 10)],
        fixed: v(6, 13, 0),
    },
    Hole {
        cve: "CVE-2025-38256",
        what: "fixed buffers in large folios are unpinned by the wrong page",
        reach: Reach::FixedBuffers,
        since: v(6, 12, 0),
        fixed_in_branches: &[v(6, 12, 36), v(6, 15, 5)],
        fixed: v(6, 16, 0),
    },
    Hole {
        cve: "CVE-2025-40216",
        what: "the offset of a fixed buffer within a large folio is computed wrongly",
        reach: Reach::FixedBuffers,
        since: v(6, 12, 0),
        fixed_in_branches: &[v(6, 12, 36), v(6, 15, 5)],
        fixed: v(6, 16, 0),
    },
    Hole {
        cve: "CVE-2026-43006",
        what: "a fixed read or write of length zero at a buffer's end reads kernel memory out of bounds",
        reach: Reach::FixedBuffers,
        since: v(6, 15, 0),
        fixed_in_branches: &[v(6, 18, 22), v(6, 19, 12)],
        fixed: v(7, 0, 0),
    },
    Hole {
        cve: "CVE-2026-46274",
        what: "cancelling queued io-wq work leaves a dangling pointer",
        reach: Reach::IoWorkers,
        since: v(5, 9, 0),
        fixed_in_branches: &[v(6, 6, 141), v(6, 12, 91), v(6, 18, 33), v(7, 0, 10)],
        fixed: rc(7, 1, 4),
    },
    Hole {
        cve: "CVE-2026-63806",
        what: "a guest's store across a page boundary to a KVM ioeventfd with datamatch halts the host",
        reach: Reach::IoeventfdDatamatch,
        since: v(2, 6, 32),
        fixed_in_branches: &[
            v(5, 10, 261),
            v(5, 15, 212),
            v(6, 1, 178),
            v(6, 6, 145),
            v(6, 12, 95),
            v(6, 18, 38),
            v(7, 1, 3),
        ],
        fixed: rc(7, 2, 1),
    },
    Hole {
        cve: "CVE-2026-64426",
        what: "NOP with IOSQE_FIXED_FILE leaks file references",
        reach: Reach::NopOperation,
        since: v(6, 13, 0),
        fixed_in_branches: &[v(6, 18, 39), v(7, 1, 4)],
        fixed: rc(7, 2, 1),
    },
];

impl Hole {
    /// Whether an upstream kernel of this version has the hole.
    pub fn affects(&self, version: KernelVersion) -> bool {
        let branch_fix = self.fixed_in_branches.iter().find(|fix| fix.same_branch(version));
        version >= self.since && version < self.fixed && branch_fix.is_none_or(|&fix| version < fix)
    }
}

/// All holes that this version of ringpass knows, the oldest first.
pub fn known_holes() -> &'static [Hole] {
    KNOWN
}

/// The known holes that a kernel has by its version.
///
/// A distributor that backports fixes from later versions may have closed some of them: see
/// [`KernelRelease::backports_of`].
pub fn affected(release: &KernelRelease) -> Vec<&'static Hole> {
    KNOWN.iter().filter(|hole| hole.affects(release.upstream())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holes_of(release: &str) -> Vec<&'static str> {
        let release = KernelRelease::parse(release, "#1 SMP", None).unwrap();
        affected(&release).into_iter().map(|hole| hole.cve).collect()
    }

    #[test]
    fn each_hole_is_present_up_to_the_version_before_its_fix_and_absent_from_the_fix_on() {
        for (cve, first, boundaries) in [
            ("CVE-2023-2598", "6.3", &[("6.3.13", "6.4")][..]),
            ("CVE-2023-6560", "6.5", &[("6.6.22", "6.6.23"), ("6.7-rc4", "6.7-rc5")]),
            (
                "CVE-2024-35831",
                "6.6",
                &[("6.6.22", "6.6.23"), ("6.7.10", "6.7.11"), ("6.8.1", "6.8.2"), ("6.8", "6.9")],
            ),
            (
                "CVE-2025-21655",
                "6.1",
                &[("6.1.124", "6.1.125"), ("6.6.71", "6.6.72"), ("6.12.9", "6.12.10"), ("6.11.11", "6.13")],
            ),
            ("CVE-2025-38256", "6.12", &[("6.12.35", "6.12.36"), ("6.15.4", "6.15.5"), ("6.14.11", "6.16")]),
            ("CVE-2025-40216", "6.12", &[("6.12.35", "6.12.36"), ("6.15.4", "6.15.5"), ("6.14.11", "6.16")]),
            ("CVE-2026-43006", "6.15", &[("6.18.21", "6.18.22"), ("6.19.11", "6.19.12"), ("6.17.13", "7.0")]),
            (
                "CVE-2026-46274",
                "5.9",
                &[
                    ("6.6.140", "6.6.141"),
                    ("6.12.90", "6.12.91"),
                    ("6.18.32", "6.18.33"),
                    ("7.0.9", "7.0.10"),
                    ("7.1-rc3", "7.1-rc4"),
                ],
            ),
            (
                "CVE-2026-63806",
                "2.6.32",
                &[
                    ("5.10.260", "5.10.261"),
                    ("5.15.211", "5.15.212"),
                    ("6.1.177", "6.1.178"),
                    ("6.6.144", "6.6.145"),
                    ("6.12.94", "6.12.95"),
                    ("6.18.37", "6.18.38"),
                    ("7.1.2", "7.1.3"),
                    ("7.0.99", "7.2-rc1"),
                ],
            ),
            ("CVE-2026-64426", "6.13", &[("6.18.38", "6.18.39"), ("7.1.3", "7.1.4"), ("7.0.99", "7.2-rc1")]),
        ] {
            assert!(holes_of(first).contains(&cve), "{cve} in {first}");
            for (last_with, first_without) in boundaries {
                assert!(holes_of(last_with).contains(&cve), "{cve} in {last_with}");
                assert!(!holes_of(first_without).contains(&cve), "{cve} in {first_without}");
            }
        }
    }

    #[test]
    fn a_kernel_older_than_a_hole_does_not_have_it() {
        assert_eq!(holes_of("6.1.178"), ["CVE-2026-46274"]);
        assert_eq!(holes_of("5.4.100"), ["CVE-2026-63806"]);
    }

    #[test]
    fn kernels_advised_for_direct_mode_have_no_known_hole() {
        for release in ["6.18.40", "6.18.44-fc-v595", "7.1.5", "7.2", "7.3.1", "6.12.97", "6.6.145"] {
            assert_eq!(holes_of(release), [""; 0], "{release}");
        }
    }

    #[test]
    fn the_table_of_holes_is_ordered_and_its_versions_are_consistent() {
        assert!(known_holes().is_sorted_by_key(|hole| {
            let (year, number) = hole.cve.strip_prefix("CVE-").unwrap().split_once('-').unwrap();
            (year.parse::<u32>().unwrap(), number.parse::<u32>().unwrap())
        }));
        for hole in known_holes() {
            assert!(hole.since < hole.fixed, "{}", hole.cve);
            assert!(hole.fixed_in_branches.is_sorted(), "{}", hole.cve);
            assert!(hole.fixed_in_branches.iter().all(|&fix| fix > hole.since && fix < hole.fixed), "{}", hole.cve);
        }
    }

    #[test]
    fn the_built_in_policies_keep_nop_and_datamatch_out_of_reach() {
        let out_of_reach: Vec<_> =
            known_holes().iter().filter(|hole| !hole.reach.is_default()).map(|h| h.cve).collect();
        assert_eq!(out_of_reach, ["CVE-2026-63806", "CVE-2026-64426"]);
    }
}
