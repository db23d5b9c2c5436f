//! The release of a kernel, and how much its version tells.

use std::{fmt, fs, io};

use super::version::KernelVersion;

/// The release of a kernel, read from what the kernel reports about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRelease {
    release: String,
    upstream: KernelVersion,
    backports: Option<&'static str>,
}

/// The kernel's release has an unknown format.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReleaseError {
    /// The release does not begin with a version.
    #[error("the kernel calls itself {release:?}, which does not begin with a version number like 6.18.44")]
    NoVersion {
        /// `uname -r`.
        release: String,
    },
}

/// Marks in `uname -r` of distributors whose kernels keep one upstream number for years and backport fixes from later
/// versions, so that the number does not tell which fixes they have.
const BACKPORTING: &[(&str, &str)] = &[
    ("uek", "Oracle"),
    (".el7", "Red Hat"),
    (".el8", "Red Hat"),
    (".el9", "Red Hat"),
    (".el10", "Red Hat"),
    (".oe", "openEuler"),
    (".an", "Anolis"),
    (".tl", "Tencent"),
    ("-pve", "Proxmox"),
    ("-android", "Android"),
];

impl KernelRelease {
    /// The release of the running kernel: `uname(2)`, and `/proc/version_signature` where Ubuntu provides it.
    ///
    /// # Errors
    ///
    /// [`ReleaseError`] if the release does not begin with a version number.
    pub fn running() -> Result<Self, ReleaseError> {
        let uname = rustix::system::uname();
        let signature = fs::read_to_string("/proc/version_signature");
        Self::parse(&uname.release().to_string_lossy(), &uname.version().to_string_lossy(), signature.ok().as_deref())
    }

    /// Parses `uname -r`, `uname -v`, and Ubuntu's `/proc/version_signature`.
    ///
    /// The upstream version is the one in `release`, except for two distributors: Debian's is in its package version
    /// (`uname -v`, "… Debian 6.1.147-1 …"), since `release` stays at 6.1.0 for years; Ubuntu's is the third word of
    /// its signature ("Ubuntu 6.8.0-45.45-generic 6.8.12").
    ///
    /// # Errors
    ///
    /// [`ReleaseError`] if `release` does not begin with a version number.
    pub fn parse(release: &str, version: &str, signature: Option<&str>) -> Result<Self, ReleaseError> {
        let Some((own, rest)) = KernelVersion::read(release) else {
            return Err(ReleaseError::NoVersion { release: release.to_owned() });
        };
        // A number from another source counts only if it is of the same branch.
        let of_branch = |text: &str| {
            KernelVersion::read(text).map(|(version, _)| version).filter(|&version| version.same_branch(own))
        };
        let release = release.to_owned();
        if signature.is_some_and(|signature| signature.starts_with("Ubuntu ")) || version.contains("-Ubuntu") {
            let signed = signature.and_then(|signature| signature.split_whitespace().nth(2)).and_then(of_branch);
            return Ok(Self { release, upstream: signed.unwrap_or(own), backports: Some("Ubuntu") });
        }
        let debian = version.split_once("Debian ").and_then(|(_, package)| of_branch(package));
        if let Some(upstream) = debian {
            return Ok(Self { release, upstream, backports: None });
        }
        let marked = BACKPORTING.iter().find(|(mark, _)| rest.contains(mark)).map(|&(_, vendor)| vendor);
        Ok(Self { upstream: own, backports: marked.or_else(|| hidden_patch_level(own, rest)), release })
    }

    /// `uname -r`, as the kernel reports it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The upstream version on which the kernel is based.
    pub fn upstream(&self) -> KernelVersion {
        self.upstream
    }

    /// The distributor, if its kernels backport fixes from later versions without changing their number: the number
    /// then does not tell which holes are closed. `None`: the number does tell.
    pub fn backports_of(&self) -> Option<&'static str> {
        self.backports
    }
}

/// `uname -r`, and the upstream version where `uname -r` does not begin with it: "6.1.0-38-amd64 (upstream 6.1.147)".
impl fmt::Display for KernelRelease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.release)?;
        match KernelVersion::read(&self.release) {
            Some((own, _)) if own != self.upstream => write!(f, " (upstream {})", self.upstream),
            _ => Ok(()),
        }
    }
}

/// The vendor of kernels whose `uname -r` leaves out the patch level of their stable branch.
fn hidden_patch_level(own: KernelVersion, rest: &str) -> Option<&'static str> {
    if own.patch != 0 {
        return None;
    }
    // SUSE's package versions begin with the service pack, as in 6.4.0-150600.23.7-default; Tumbleweed's, which
    // follows upstream, with a small number.
    let package: String = rest.strip_prefix('-')?.chars().take_while(char::is_ascii_digit).collect();
    (package.len() >= 6).then_some("SUSE")
}

impl From<ReleaseError> for io::Error {
    fn from(error: ReleaseError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(release: &str, version: &str, signature: Option<&str>) -> (String, Option<&'static str>) {
        let parsed = KernelRelease::parse(release, version, signature).unwrap();
        assert_eq!(parsed.release(), release);
        (parsed.upstream().to_string(), parsed.backports_of())
    }

    #[test]
    fn kernels_that_follow_a_stable_branch_have_the_version_that_they_report() {
        for (release, upstream) in [
            ("6.18.44-fc-v595", "6.18.44"),
            ("6.17.4-arch2-1", "6.17.4"),
            ("6.17.4-200.fc42.x86_64", "6.17.4"),
            ("6.1.155-176.282.amzn2023.x86_64", "6.1.155"),
            ("6.12.40-0-lts", "6.12.40"),
            ("6.17.5-1-default", "6.17.5"),
            ("7.2.0-rc3", "7.2-rc3"),
            ("7.0.0", "7.0"),
        ] {
            assert_eq!(parse(release, "#1 SMP PREEMPT_DYNAMIC", None), (upstream.to_owned(), None), "{release}");
        }
    }

    #[test]
    fn a_debian_kernel_has_the_version_of_its_package() {
        let version = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.147-1 (2025-08-02)";
        assert_eq!(parse("6.1.0-38-amd64", version, None), ("6.1.147".to_owned(), None));
        let version = "#1 SMP PREEMPT_DYNAMIC Debian 6.12.97-1 (2026-07-01)";
        assert_eq!(parse("6.12+deb13-amd64", version, None), ("6.12.97".to_owned(), None));
        let version = "#1 SMP PREEMPT_DYNAMIC Debian 6.12.48-1~bpo12+1 (2025-09-30)";
        assert_eq!(parse("6.12.48+deb12-amd64", version, None), ("6.12.48".to_owned(), None));
    }

    #[test]
    fn a_debian_kernel_without_its_package_version_counts_as_the_first_of_its_branch() {
        assert_eq!(parse("6.1.0-38-amd64", "#1 SMP", None), ("6.1".to_owned(), None));
        assert_eq!(parse("6.1.0-38-amd64", "#1 SMP Debian 5.10.1-1", None), ("6.1".to_owned(), None));
    }

    #[test]
    fn an_ubuntu_kernel_has_the_version_of_its_signature_which_does_not_tell_its_fixes() {
        let signature = Some("Ubuntu 6.8.0-45.45-generic 6.8.12\n");
        assert_eq!(
            parse("6.8.0-45-generic", "#45-Ubuntu SMP PREEMPT_DYNAMIC", signature),
            ("6.8.12".to_owned(), Some("Ubuntu"))
        );
        assert_eq!(parse("6.8.0-45-generic", "#45-Ubuntu SMP", None), ("6.8".to_owned(), Some("Ubuntu")));
    }

    #[test]
    fn a_release_is_shown_with_its_hidden_upstream_version() {
        let shown = |release, version| KernelRelease::parse(release, version, None).unwrap().to_string();
        assert_eq!(shown("6.18.44-fc-v595", "#1 SMP"), "6.18.44-fc-v595");
        assert_eq!(shown("6.1.0-38-amd64", "#1 SMP Debian 6.1.147-1"), "6.1.0-38-amd64 (upstream 6.1.147)");
    }

    #[test]
    fn distributors_that_backport_are_recognised_by_their_marks() {
        for (release, vendor) in [
            ("5.14.0-503.11.1.el9_5.x86_64", "Red Hat"),
            ("6.12.0-55.9.1.el10_0.x86_64", "Red Hat"),
            ("5.15.0-300.163.18.el9uek.x86_64", "Oracle"),
            ("6.4.0-150600.23.7-default", "SUSE"),
            ("6.8.12-4-pve", "Proxmox"),
            ("6.6.50-android15-8-g1234", "Android"),
            ("6.6.0-72.0.0.76.oe2403.x86_64", "openEuler"),
        ] {
            assert_eq!(parse(release, "#1 SMP", None).1, Some(vendor), "{release}");
        }
    }

    #[test]
    fn a_release_without_a_version_is_refused() {
        assert_eq!(
            KernelRelease::parse("mykernel", "#1", None).unwrap_err().to_string(),
            "the kernel calls itself \"mykernel\", which does not begin with a version number like 6.18.44"
        );
    }

    #[test]
    fn the_running_kernel_has_a_version() {
        let running = KernelRelease::running().unwrap();
        assert!(running.upstream() >= KernelVersion::released(5, 1, 0), "{running:?}");
    }
}
