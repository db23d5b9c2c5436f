//! The policy tests on other kernels: runs the program `policy_on_kernel`, linked statically, in Linux guests, and
//! makes a table of its results.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::{
    linux_guest::{LinuxGuest, LinuxGuestConfig},
    seed::{self, Seed},
};

const PACKAGE: &str = "ringpass-policy-on-kernel";
const PROGRAM: &str = "policy_on_kernel";
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Environment variable: a kernel (`bzImage`) for a guest, beside Debian's.
pub const KERNEL_IMAGE: &str = "RINGPASS_KERNEL_IMAGE";

/// The amount of work for the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amount {
    /// The number of random SQEs to compare, besides all opcodes with all flags under each built-in policy.
    pub compared: u64,
    /// The number of SQEs that try to escape from each built-in policy that the kernel enforces.
    pub sound: u64,
    /// How long the program may take in a guest.
    pub limit: Duration,
}

/// The results of the program on one kernel.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct KernelReport {
    /// `uname -r`.
    pub kernel: String,
    /// The semantics of the restrictions: `before-linux-7.0` or `from-linux-7.0`.
    pub semantics: String,
    /// SQE operations that the kernel executes.
    pub operations: u32,
    /// Register operations that the kernel takes in a table.
    pub register_operations: u32,
    /// SQEs of the comparison of all opcodes with all flags.
    pub exhaustive: u64,
    /// Random SQEs that were compared.
    pub compared: u64,
    /// Random tables.
    pub tables: u64,
    /// Random SQEs that kernel and checker allow.
    pub allowed: u64,
    /// Random SQEs that both refuse by the table.
    pub refused_by_table: u64,
    /// Random SQEs that both refuse under any table.
    pub refused_before: u64,
    /// Always 0: the first disagreement ends the program with an error.
    pub disagreements: u64,
    /// SQEs that tried to escape.
    pub sound_sqes: u64,
    /// The SQEs among them that the kernel executed.
    pub executed: u64,
    /// The seed of the random choices.
    pub seed: String,
}

impl KernelReport {
    fn parse(output: &str) -> Result<Self> {
        let line = output.lines().find(|line| line.starts_with('{')).with_context(|| format!("no report: {output}"))?;
        serde_json::from_str(line).with_context(|| format!("not what the program reports: {line}"))
    }

    /// Checks that the program did all of its work, and that enough of it is significant.
    ///
    /// # Errors
    ///
    /// The program did too little. The error names what.
    pub fn check(&self, amount: Amount) -> Result<()> {
        ensure!(self.disagreements == 0 && self.compared == amount.compared, "{self:?}");
        // 256 opcodes, 256 flags, four policies.
        ensure!(self.exhaustive == 4 * 65_536, "{self:?}");
        for count in [self.allowed, self.refused_by_table, self.refused_before] {
            ensure!(count > amount.compared / 1000, "{self:?}");
        }
        ensure!(self.sound_sqes >= 2 * amount.sound && self.executed > amount.sound / 50, "{self:?}");
        Ok(())
    }
}

/// Builds the program, linked statically, in a directory of its own beside the other programs of this build.
///
/// # Errors
///
/// The program does not build.
pub fn build_program() -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests have no workspace")?;
    let directory = target_directory()?.join("policy-on-kernel");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Settings of cargo for programs of this machine (coverage, sanitizers, another CPU) must not apply to this
    // program.
    for (name, _) in env::vars_os() {
        let foreign = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_"];
        if name.to_str().is_some_and(|name| foreign.iter().any(|prefix| name.starts_with(prefix))) {
            cargo.env_remove(name);
        }
    }
    cargo
        .current_dir(workspace)
        .args(["build", "--quiet", "--locked", "--package", PACKAGE, "--bin", PROGRAM, "--target", TARGET])
        .arg("--target-dir")
        .arg(&directory)
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    let output = cargo.output().context("cannot start cargo")?;
    ensure!(output.status.success(), "building {PACKAGE}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(directory.join(TARGET).join("debug").join(PROGRAM))
}

/// The target directory in which this program is.
fn target_directory() -> Result<PathBuf> {
    let program = env::current_exe().context("the path of this program")?;
    let found = program.ancestors().find(|directory| directory.join("CACHEDIR.TAG").exists());
    found.map(Path::to_owned).with_context(|| format!("{} is in no target directory", program.display()))
}

/// Runs the program on this machine's kernel.
///
/// # Errors
///
/// A disagreement, damage, or the program does not run.
pub fn on_host(program: &Path, amount: Amount, seed: Seed) -> Result<KernelReport> {
    let mut command = Command::new(program);
    command.args([amount.compared.to_string(), amount.sound.to_string()]);
    let output =
        command.env(seed::VARIABLE, format!("{:#x}", seed.value())).output().context("cannot start the program")?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    KernelReport::parse(&said)
}

/// Runs the program in a guest with another kernel.
///
/// # Errors
///
/// A disagreement, damage, or the guest does not come up.
pub fn in_guest(program: &Path, config: LinuxGuestConfig, amount: Amount, seed: Seed) -> Result<KernelReport> {
    let mut guest = LinuxGuest::boot(&LinuxGuestConfig { programs: vec![program.to_owned()], ..config })?;
    let Amount { compared, sound, limit } = amount;
    // The program's files have no names, so they need only that the guest's /tmp exists.
    let script = format!("{}={:#x} /sbin/{PROGRAM} {compared} {sound}", seed::VARIABLE, seed.value());
    let job = guest.spawn(&script)?;
    let said = guest.wait(job, limit)?;
    guest.shut_down()?;
    KernelReport::parse(&said)
}

/// The reports as a document.
pub fn document(reports: &[KernelReport]) -> String {
    let mut text = String::from(
        "# Kernels on which the restriction policies were tested\n\n\
         `cargo xtask kernel-support` writes this file; do not edit it. Each row is one run of the program `policy_on_kernel`\n\
         (`tests/policy-on-kernel`) on that kernel. A run ends at the first disagreement between kernel and checker, and at the\n\
         first byte that changes outside the registered buffers or the file in the table. A run that ends there gets no row.\n\n\
         - **Semantics**: what the kernel does with one class of operations if the table has rules for the other class only. It\n  \
         denies them before Linux 7.0, and allows all of them from then on. The program finds this out by trial.\n\
         - **Operations**: SQE operations that the kernel executes, and register operations that a table can name.\n\
         - **Compared**: SQEs on which kernel and checker agreed, in verdict and errno: all 256 opcodes with all 256 flags\n  \
         under each built-in policy, and random SQEs under random tables.\n\
         - **Looked for a way out**: SQEs with any bytes under the built-in direct policies, and how many of them did\n  \
         something.\n\n\
         | Kernel | Semantics | Operations | Compared | Disagreements | Looked for a way out | Seed |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for report in reports {
        let KernelReport { kernel, semantics, operations, register_operations, exhaustive, compared, tables, .. } =
            report;
        let KernelReport { disagreements, sound_sqes, executed, seed, .. } = report;
        text.push_str(&format!(
            "| {kernel} | {semantics} | {operations} + {register_operations} | {exhaustive} + {compared} under {tables} \
             tables | {disagreements} | {sound_sqes}, {executed} did something | `{seed}` |\n"
        ));
    }
    text
}

/// Writes the document.
///
/// # Errors
///
/// The file cannot be written.
pub fn write_document(path: &Path, reports: &[KernelReport]) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    fs::write(path, document(reports)).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "{\"kernel\":\"6.1.0-1-cloud\",\"semantics\":\"before-linux-7.0\",\"operations\":48,\
        \"register_operations\":26,\"exhaustive\":262144,\"compared\":1000,\"tables\":3,\"allowed\":100,\
        \"refused_by_table\":800,\"refused_before\":100,\"disagreements\":0,\"sound_sqes\":400,\"executed\":90,\
        \"seed\":\"0x7\"}";
    const AMOUNT: Amount = Amount { compared: 1000, sound: 200, limit: Duration::ZERO };

    #[test]
    fn a_report_becomes_a_row() {
        let report = KernelReport::parse(&format!("RINGPASS_SEED=0x7\n{LINE}\n")).expect("a report");
        report.check(AMOUNT).expect("it did what it was told");
        let document = document(&[report]);
        let row = document.lines().last().expect("a row");
        assert_eq!(
            row,
            "| 6.1.0-1-cloud | before-linux-7.0 | 48 + 26 | 262144 + 1000 under 3 tables | 0 | 400, 90 did something \
             | `0x7` |"
        );
    }

    #[test]
    fn check_refuses_a_report_of_too_little_work() {
        let report = KernelReport::parse(LINE).expect("a report");
        for short in [
            KernelReport { compared: 999, ..report.clone() },
            KernelReport { disagreements: 1, ..report.clone() },
            KernelReport { exhaustive: 65_536, ..report.clone() },
            KernelReport { allowed: 1, ..report.clone() },
            KernelReport { sound_sqes: 399, ..report.clone() },
            KernelReport { executed: 4, ..report.clone() },
        ] {
            assert!(short.check(AMOUNT).is_err(), "{short:?}");
        }
        assert!(KernelReport::parse("{\"error\":\"no\"}").is_err());
        assert!(KernelReport::parse("Illegal instruction").is_err());
    }
}
