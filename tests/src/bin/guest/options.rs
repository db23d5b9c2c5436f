//! The command line.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use ringpass_tests::linux_guest::KernelSeries;

use crate::kernel_image;

/// Boot a Debian kernel with the repository's Linux driver (guest-driver/linux) in QEMU, on a disk of `ringpass serve`.
///
/// Without --shell and --script, the guest runs a demonstration: fio writes to the disk and verifies what it reads, and a
/// table shows what went over rings.
#[derive(Clone, Debug, Parser)]
#[command(name = "cargo xtask guest", after_help = AFTER_HELP)]
pub(crate) struct Options {
    /// The kernel: `stable` (Debian 12's 6.1), `backports` (6.12, which Debian 13 has too), `newest` (of Debian sid), or the
    /// path of a bzImage with virtio_pci, initramfs, tmpfs and a serial port built in.
    #[arg(long, value_name = "KERNEL", default_value = "stable", value_parser = Kernel::parse)]
    pub(crate) kernel: Kernel,
    /// With a bzImage: the headers with which the driver is built, for example /lib/modules/RELEASE/build.
    #[arg(long, value_name = "DIR")]
    pub(crate) headers: Option<PathBuf>,
    /// Run this script (of busybox's shell) in the guest, and exit with its exit status.
    #[arg(long, value_name = "FILE")]
    pub(crate) script: Option<PathBuf>,
    /// Open a shell in the guest. `exit` ends the guest, and Ctrl-A X ends a guest that no longer answers.
    #[arg(long, conflicts_with = "script")]
    pub(crate) shell: bool,
    /// The number of virtual CPUs.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) cpus: u32,
    /// The guest's RAM in MiB. The host kernel pins all of it for rings.
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u32).range(256..=1 << 20))]
    pub(crate) memory_mib: u32,
    /// The disk: a file or a block device. The default is an image that vanishes with the guest.
    #[arg(long, value_name = "FILE")]
    pub(crate) disk: Option<PathBuf>,
    /// The number of virtqueues. Queue 0 never has a ring. The default is one more than there are CPUs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=256))]
    pub(crate) queues: Option<u16>,
    /// When the server offers rings: see `ringpass serve --help`.
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = ["auto", "direct", "virtqueue"])]
    pub(crate) mode: String,
}

const AFTER_HELP: &str = "\
The guest has busybox, fio, mkfs.ext4, e2fsck and blkdiscard, and no network; the disk is /dev/vda. The command `rings` there
shows what each queue does. The exit status is that of the script, 125 if something else went wrong, and 128 and the
number of the signal after Ctrl-C.";

impl Options {
    /// Checks what one option alone does not tell.
    ///
    /// # Errors
    ///
    /// Two options do not fit together, or a file is not what its option wants.
    pub(crate) fn check(&self) -> Result<()> {
        match (&self.kernel, &self.headers) {
            (Kernel::Image(image), None) => {
                let release = kernel_image::release(image)?;
                anyhow::bail!(
                    "{} needs --headers DIR: the driver is built for it, with the headers of Linux {release} (most often \
                     /lib/modules/{release}/build)",
                    image.display()
                );
            }
            (Kernel::Image(image), Some(headers)) => kernel_image::check_headers(image, headers)?,
            (Kernel::Debian(_), Some(_)) => anyhow::bail!(
                "--headers goes with --kernel IMAGE: the headers of Debian's kernels come from Debian; leave it out"
            ),
            (Kernel::Debian(_), None) => {}
        }
        if let Some(disk) = &self.disk {
            ensure!(
                self.shell || self.script.is_some(),
                "the demonstration would write over {}: use --shell or --script FILE with --disk",
                disk.display()
            );
            std::fs::metadata(disk).with_context(|| {
                format!("cannot use {0} as the disk (`truncate -s 1G {0}` makes an empty one)", disk.display())
            })?;
        }
        Ok(())
    }

    /// The number of virtqueues.
    pub(crate) fn queues(&self) -> u16 {
        // At most 64 CPUs.
        self.queues.unwrap_or(self.cpus as u16 + 1)
    }
}

/// The kernel of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    Debian(KernelSeries),
    Image(PathBuf),
}

impl Kernel {
    fn parse(text: &str) -> Result<Self, String> {
        Ok(match text {
            "stable" | "6.1" => Self::Debian(KernelSeries::Linux6_1),
            "backports" | "6.12" => Self::Debian(KernelSeries::Linux6_12),
            "newest" => Self::Debian(KernelSeries::Newest),
            path if std::path::Path::new(path).is_file() => Self::Image(path.into()),
            _ => return Err("it is neither `stable`, `backports` or `newest` nor a file".to_owned()),
        })
    }

    /// The series whose programs the guest has.
    pub(crate) fn series(&self) -> KernelSeries {
        match self {
            Self::Debian(series) => *series,
            // The programs do not depend on the kernel.
            Self::Image(_) => KernelSeries::Linux6_12,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options> {
        let options = Options::try_parse_from(["guest"].iter().chain(words)).context("clap")?;
        options.check().map(|()| options)
    }

    fn refusal(words: &[&str]) -> String {
        format!("{:#}", parse(words).expect_err("a refusal"))
    }

    #[test]
    fn the_defaults_are_a_demonstration_on_the_stable_kernel_with_a_queue_for_each_cpu() {
        let options = parse(&[]).expect("no options");
        assert_eq!((options.kernel.series(), options.shell, options.queues()), (KernelSeries::Linux6_1, false, 3));
        assert_eq!(parse(&["--cpus", "64"]).expect("CPUs").queues(), 65);
        assert_eq!(parse(&["--cpus", "4", "--queues", "2"]).expect("queues").queues(), 2);
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        for (words, part) in [
            (&["--kernel", "/no/bzImage"][..], "neither `stable`, `backports` or `newest` nor a file"),
            (&["--kernel", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")], "is not a bzImage"),
            (&["--headers", "/usr"], "--headers goes with --kernel IMAGE"),
            (&["--disk", "/no/disk"], "use --shell or --script FILE"),
            (&["--shell", "--disk", "/no/disk"], "truncate -s 1G /no/disk"),
            (&["--shell", "--script", "x"], "cannot be used with"),
            (&["--queues", "1"], "1 is not in 2..=256"),
        ] {
            let refusal = refusal(words);
            assert!(refusal.contains(part), "{words:?}: {refusal}");
        }
    }
}
