//! One run of the script in a child process.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_broker::{direct::SubmissionConfig, ring::SqThreadConfig};
use ringpass_restrictions::{Access, Operation, Policy, SqeFlags};
use ringpass_tests::{
    canaries::pattern,
    disks::{DiskKind, TestDisk},
    process_guest::Place,
};

/// Set for the child process. Its arguments are three paths and [`Run::arguments`].
pub(crate) const CHILD_VARIABLE: &str = "RINGPASS_TEST_HOSTILE";

pub(crate) const DISK_BYTES: u64 = 1 << 20;

/// The policy of the hostile guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rules {
    /// The built-in policy.
    BuiltIn,
    /// The guest may also use descriptors of the process.
    AnyFile,
    /// The guest may also read to addresses of the process.
    PlainRead,
}

/// One run of the script.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) rules: Rules,
    pub(crate) access: Access,
    pub(crate) place: Place,
    pub(crate) sq_thread: bool,
    pub(crate) direct_io: bool,
    pub(crate) capped: bool,
}

impl Run {
    pub(crate) const STRICT: Self = Self {
        rules: Rules::BuiltIn,
        access: Access::ReadWrite,
        place: Place::GuestRam,
        sq_thread: false,
        direct_io: false,
        capped: true,
    };

    pub(crate) fn arguments(self) -> [String; 6] {
        [
            format!("{:?}", self.rules),
            format!("{:?}", self.access),
            self.place.to_string(),
            self.sq_thread.to_string(),
            self.direct_io.to_string(),
            self.capped.to_string(),
        ]
    }

    pub(crate) fn parse(arguments: &[String]) -> Result<Self> {
        for rules in [Rules::BuiltIn, Rules::AnyFile, Rules::PlainRead] {
            for access in [Access::ReadWrite, Access::ReadOnly] {
                for place in [Place::GuestRam, Place::Window] {
                    for bits in 0..8 {
                        let bit = |index: u32| bits & 1 << index != 0;
                        let run = Self { rules, access, place, sq_thread: bit(0), direct_io: bit(1), capped: bit(2) };
                        if run.arguments() == arguments {
                            return Ok(run);
                        }
                    }
                }
            }
        }
        bail!("not a run: {arguments:?}")
    }

    pub(crate) fn policy(self) -> Policy {
        let policy = Policy::direct(self.access);
        match self.rules {
            Rules::BuiltIn => policy,
            Rules::AnyFile => policy.with_flags_required(SqeFlags::empty()),
            Rules::PlainRead => policy.allow(Operation::READ),
        }
    }

    /// The timeout of each request. Under a wrong policy a request may never complete, so it is short there.
    pub(crate) fn timeout(self) -> Duration {
        if self.rules == Rules::BuiltIn { Duration::from_secs(10) } else { Duration::from_millis(300) }
    }

    pub(crate) fn submission(self) -> SubmissionConfig {
        if self.sq_thread {
            SubmissionConfig::SqThread(SqThreadConfig::new(Duration::from_millis(5)))
        } else {
            SubmissionConfig::Doorbell
        }
    }
}

/// The result of a run: the number of steps, and all findings.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) steps: u64,
    pub(crate) findings: Vec<String>,
    /// Whether the part of the image that is the disk has not changed.
    pub(crate) disk_is_same: bool,
    pub(crate) image_bytes: u64,
}

impl Outcome {
    pub(crate) fn has(&self, beginning: &str) -> bool {
        self.findings.iter().any(|finding| finding.starts_with(beginning))
    }

    /// The first few findings.
    pub(crate) fn text(&self) -> String {
        let shown: Vec<&str> = self.findings.iter().map(String::as_str).take(12).collect();
        format!("{} findings: {}", self.findings.len(), shown.join("; "))
    }
}

/// Runs the script in a child process.
pub(crate) fn run(run: Run) -> Result<Outcome> {
    let (disk, other) =
        (TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?, TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?);
    for (seed, disk) in [(1, &disk), (2, &other)] {
        File::options().write(true).open(disk.path())?.write_all_at(&pattern(seed, DISK_BYTES as usize), 0)?;
    }
    let disk_before = read(disk.path())?;

    let directory = tempfile::tempdir()?;
    let (findings, errors) = (directory.path().join("findings"), directory.path().join("errors"));
    let status = Command::new(env::current_exe()?)
        .args([disk.path(), other.path(), &findings])
        .args(run.arguments())
        .env(CHILD_VARIABLE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // Standard error is a file, because a guest that reaches it may damage it.
        .stderr(File::create(&errors)?)
        .status()?;
    let errors = fs::read(&errors)?;
    ensure!(status.success(), "{run:?}: the child ended with {status}: {}", String::from_utf8_lossy(&errors));
    let text = fs::read_to_string(&findings)?;
    let mut lines = text.lines();
    let steps = lines.next().context("the number of steps")?.parse()?;
    let findings = lines.map(str::to_owned).collect();
    let image_bytes = fs::metadata(disk.path())?.len();
    Ok(Outcome { steps, findings, disk_is_same: read(disk.path())? == disk_before, image_bytes })
}

/// The content of a disk, without the part by which the image has grown: that can be a tebibyte.
fn read(path: &Path) -> Result<Vec<u8>> {
    let mut content = vec![0; DISK_BYTES as usize];
    File::open(path)?.read_exact_at(&mut content, 0)?;
    Ok(content)
}
