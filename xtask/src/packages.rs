//! The Debian packages that the tests need, with the reasons, and their installation.

use std::{
    env,
    io::{IsTerminal, stdin},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::steps;

/// A Debian package, and the reason why the tests need it.
struct Package {
    name: &'static str,
    reason: &'static str,
}

/// All packages that the tests need in addition to Rust. Add a line here for a new test.
const PACKAGES: &[Package] = &[
    Package { name: "gcc", reason: "compiles the C programs that print the kernel's structures; links Rust programs" },
    Package { name: "libc6-dev", reason: "headers and start-up code for those C programs" },
    Package { name: "linux-libc-dev", reason: "<linux/io_uring.h>, which a test compares with our structures" },
    Package { name: "e2fsprogs", reason: "mkfs.ext4: the file systems of the disks under test" },
    Package { name: "squashfs-tools", reason: "mksquashfs: a read-only file system without fsync(2) under a disk" },
    Package { name: "xfsprogs", reason: "mkfs.xfs: files whose direct I/O changes when they are copied" },
    Package { name: "btrfs-progs", reason: "mkfs.btrfs: files that report nothing about direct I/O" },
    Package { name: "mount", reason: "mount and losetup: file systems and loop devices under test" },
    Package { name: "qemu-system-x86", reason: "runs the Linux guests, and forwards what hostile drivers write" },
    Package { name: "systemd", reason: "systemd-analyze: checks the unit that starts the server" },
    Package { name: "make", reason: "builds fio for the Linux guests, from Debian's sources" },
];

/// Those of them that a Linux guest needs (`cargo xtask guest`).
pub(crate) const FOR_GUESTS: [&str; 5] = ["gcc", "libc6-dev", "e2fsprogs", "qemu-system-x86", "make"];

/// What only Debian's own Cargo needs: toolchains of rustup come with these commands.
const OF_CARGO: &[Package] = &[
    Package { name: "rustfmt", reason: "cargo fmt, which checks the format" },
    Package { name: "rust-clippy", reason: "cargo clippy, which lints" },
];
const DEBIANS_CARGO: &str = "/usr/bin/cargo";

/// Installs the missing ones of all packages. If none is missing, it changes nothing and needs no privileges.
pub(crate) fn install_all_missing() -> Result<()> {
    let is_debians_cargo = env::var_os("CARGO").is_some_and(|cargo| cargo == DEBIANS_CARGO);
    let of_cargo: &[Package] = if is_debians_cargo { OF_CARGO } else { &[] };
    install_missing_of(&PACKAGES.iter().chain(of_cargo).collect::<Vec<_>>())
}

/// The same for the packages with these names.
pub(crate) fn install_missing(names: &[&str]) -> Result<()> {
    install_missing_of(&PACKAGES.iter().filter(|package| names.contains(&package.name)).collect::<Vec<_>>())
}

fn install_missing_of(packages: &[&Package]) -> Result<()> {
    if !steps::is_available("dpkg-query", &["--version"]) {
        eprintln!("not a Debian system (no dpkg-query); this needs the contents of these Debian packages:");
        for package in packages {
            eprintln!("  {:<16}{}", package.name, package.reason);
        }
        return Ok(());
    }
    let mut missing = Vec::new();
    for package in packages {
        if !is_installed(package.name)? {
            eprintln!("missing: {} ({})", package.name, package.reason);
            missing.push(package.name);
        }
    }
    if missing.is_empty() {
        eprintln!("all packages are installed");
        return Ok(());
    }
    install(&missing)
}

fn is_installed(package: &str) -> Result<bool> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .context("cannot start dpkg-query")?;
    Ok(says_installed(output.status.success(), &output.stdout))
}

/// Whether dpkg-query reports the package as installed. It fails for a package that dpkg does not know, and succeeds
/// for a removed package, which is not installed.
fn says_installed(succeeded: bool, status: &[u8]) -> bool {
    succeeded && status == b"installed"
}

fn install(packages: &[&str]) -> Result<()> {
    let by_hand = format!(
        "run this as root, then try again:\n  apt-get update && apt-get install --yes --no-install-recommends {}",
        packages.join(" ")
    );
    let prefix: &[&str] = if rustix::process::geteuid().is_root() {
        &[]
    } else if !steps::is_available("sudo", &["--version"]) {
        bail!("packages are missing and sudo is not installed; {by_hand}");
    } else if stdin().is_terminal() {
        &["sudo"]
    } else {
        // Without a terminal, no user can type a password.
        &["sudo", "--non-interactive"]
    };
    let apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"];
    let update = [prefix, &apt, &["update"]].concat();
    let install = [prefix, &apt, &["install", "--yes", "--no-install-recommends"], packages].concat();
    for words in [update, install] {
        if let Err(error) = steps::run(Command::new(words[0]).args(&words[1..])) {
            bail!("{error:#}; {by_hand}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_has_a_reason_and_is_listed_once() {
        for (index, package) in PACKAGES.iter().enumerate() {
            assert!(!package.reason.is_empty(), "{}", package.name);
            assert!(PACKAGES[..index].iter().all(|earlier| earlier.name != package.name), "{} twice", package.name);
        }
    }

    #[test]
    fn every_package_for_guests_is_in_the_list() {
        assert!(FOR_GUESTS.iter().all(|name| PACKAGES.iter().any(|package| package.name == *name)));
    }

    #[test]
    fn only_an_installed_package_counts_as_installed() {
        assert!(says_installed(true, b"installed"));
        for (succeeded, status) in [(true, &b"config-files"[..]), (true, b"not-installed"), (false, b"")] {
            assert!(!says_installed(succeeded, status), "{status:?}");
        }
    }
}
