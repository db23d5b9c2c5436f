//! One run of a hostile guest's script, in a child process: a test program starts itself again. The limit on the growth of
//! files holds for a whole process, and under a policy that is wrong on purpose the guest really does damage.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use ringpass_broker::{direct::SubmissionConfig, ring::SqThreadConfig};
use ringpass_restrictions::{Access, Operation, Policy, SqeFlags};
use ringpass_workload::hostile::{HostileReport, Target, Violation};

use crate::{
    canaries::pattern,
    disks::{DiskKind, TestDisk},
    process_guest::Place,
};

/// Set for the child process.
const CHILD_VARIABLE: &str = "RINGPASS_TEST_HOSTILE";

/// Size of the disk of the hostile guest, and of that of another guest.
pub const DISK_BYTES: u64 = 1 << 20;
/// The seed of the content of the hostile guest's disk.
pub const DISK: u64 = 1;
/// The seed of the content of the other guest's disk.
pub const OTHER_DISK: u64 = 2;

/// The policy of the hostile guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// The built-in policy.
    BuiltIn,
    /// The guest may also use descriptors of the process.
    AnyFile,
    /// The guest may also read to addresses of the process.
    PlainRead,
}

/// One run of the script.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// The policy.
    pub rules: Rules,
    /// What the guest may do with its disk.
    pub access: Access,
    /// The place of the ring.
    pub place: Place,
    /// Whether an SQ thread takes the requests. If not, the guest rings a doorbell.
    pub sq_thread: bool,
    /// Whether the disk is opened for direct I/O.
    pub direct_io: bool,
    /// Whether the process limits the growth of its files.
    pub capped: bool,
}

impl Run {
    /// With the built-in policy and the limit.
    pub const STRICT: Self = Self {
        rules: Rules::BuiltIn,
        access: Access::ReadWrite,
        place: Place::GuestRam,
        sq_thread: false,
        direct_io: false,
        capped: true,
    };

    fn arguments(self) -> [String; 6] {
        [
            format!("{:?}", self.rules),
            format!("{:?}", self.access),
            self.place.to_string(),
            self.sq_thread.to_string(),
            self.direct_io.to_string(),
            self.capped.to_string(),
        ]
    }

    fn parse(arguments: &[String]) -> Result<Self> {
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

    /// The policy of the guest.
    pub fn policy(self) -> Policy {
        let policy = Policy::direct(self.access);
        match self.rules {
            Rules::BuiltIn => policy,
            Rules::AnyFile => policy.with_flags_required(SqeFlags::empty()),
            Rules::PlainRead => policy.allow(Operation::READ),
        }
    }

    /// Whether the guest has the built-in policy.
    pub fn is_strict(self) -> bool {
        self.rules == Rules::BuiltIn
    }

    /// The timeout of each request. Under a wrong policy a request may never complete, so it is short there.
    pub fn timeout(self) -> Duration {
        if self.is_strict() { Duration::from_secs(10) } else { Duration::from_millis(300) }
    }

    /// How the guest's requests reach the kernel.
    pub fn submission(self) -> SubmissionConfig {
        if self.sq_thread {
            SubmissionConfig::SqThread(SqThreadConfig::new(Duration::from_millis(5)))
        } else {
            SubmissionConfig::Doorbell
        }
    }
}

/// The result of a run: the number of steps, and all findings.
#[derive(Debug)]
pub struct Outcome {
    /// The number of steps that the guest has done.
    pub steps: u64,
    /// Answers that are not allowed, and damage.
    pub findings: Vec<String>,
    /// Whether the part of the image that is the disk has not changed.
    pub disk_is_same: bool,
    /// Size of the image after the run.
    pub image_bytes: u64,
}

impl Outcome {
    /// Whether a finding begins so.
    pub fn has(&self, beginning: &str) -> bool {
        self.findings.iter().any(|finding| finding.starts_with(beginning))
    }

    /// The first few findings.
    pub fn text(&self) -> String {
        let shown: Vec<&str> = self.findings.iter().map(String::as_str).take(12).collect();
        format!("{} findings: {}", self.findings.len(), shown.join("; "))
    }
}

/// What a child process has to do.
#[derive(Debug)]
pub struct ChildTask {
    /// The run.
    pub run: Run,
    /// The image of the hostile guest's disk.
    pub disk: PathBuf,
    /// The image of the other guest's disk.
    pub other_disk: PathBuf,
    findings: PathBuf,
}

impl ChildTask {
    /// An address on the heap of this process.
    pub fn heap_address(&self) -> u64 {
        self.disk.as_os_str().as_encoded_bytes().as_ptr().addr() as u64
    }

    /// Reports the end of the run to the parent.
    ///
    /// # Errors
    ///
    /// The file for the findings cannot be written.
    pub fn report(&self, steps: u64, findings: &[String]) -> Result<()> {
        let lines: Vec<String> = [steps.to_string()].into_iter().chain(findings.iter().cloned()).collect();
        fs::write(&self.findings, lines.join("\n")).context("cannot write the findings")
    }
}

/// The task of this process, if it is a child process of [`run`].
///
/// # Errors
///
/// Its arguments are not those of such a process.
pub fn child_task() -> Result<Option<ChildTask>> {
    if env::var_os(CHILD_VARIABLE).is_none() {
        return Ok(None);
    }
    let arguments: Vec<String> = env::args().skip(1).collect();
    let ([disk, other_disk, findings], run) = arguments.split_first_chunk().context("three paths")?;
    let run = Run::parse(run)?;
    Ok(Some(ChildTask { run, disk: disk.into(), other_disk: other_disk.into(), findings: findings.into() }))
}

/// Runs the script in a child process.
///
/// # Errors
///
/// A disk cannot be made, or the child process fails.
pub fn run(run: Run) -> Result<Outcome> {
    let (disk, other) =
        (TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?, TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?);
    for (seed, disk) in [(DISK, &disk), (OTHER_DISK, &other)] {
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

/// The answers of the kernel that are not allowed.
///
/// # Errors
///
/// There is no script for this target.
pub fn answers(report: &HostileReport, target: &Target<'_>) -> Result<Vec<String>> {
    let named = report.named(target).map_err(|error| anyhow!("{error}"))?;
    let mut findings: Vec<String> = named
        .map(|(step, violation)| match violation.res {
            Violation::NO_ANSWER => format!("answer: {}: none", step.name),
            res => format!("answer: {}: {res}, allowed was {:?}", step.name, step.expect),
        })
        .collect();
    if report.violations > findings.len() as u64 {
        findings.push(format!("answers that are not allowed: {}", report.violations));
    }
    if report.unexpected != 0 {
        findings.push(format!("completions of no request: {}", report.unexpected));
    }
    Ok(findings)
}

/// The content of a disk, without the part by which the image has grown: that can be a tebibyte.
///
/// # Errors
///
/// The file cannot be read, or is shorter.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let mut content = vec![0; DISK_BYTES as usize];
    File::open(path)?.read_exact_at(&mut content, 0)?;
    Ok(content)
}
