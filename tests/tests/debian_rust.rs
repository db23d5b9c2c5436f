//! The packages that README.md names for Debian 13 are enough: they build all crates and their tests, and the demo
//! runs.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    debian::Installation,
    harness::{self, test},
    needs::Need,
};
use serde_json::Value;

const SUITE: &str = "trixie";
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> ExitCode {
    let needs = || Installation::needs().into_iter().chain([Need::io_uring(), Need::cpus(2)]);
    harness::run(vec![
        test("the_packages_of_the_readme_build_the_program_and_its_demo_runs", needs(), || {
            let machine = Machine::new()?;
            machine.check_version()?;
            machine.run_demo()
        }),
        test("the_packages_of_the_readme_compile_all_tests", needs(), || {
            Machine::new()?.cargo(&["check", "--workspace", "--all-targets"]).map(drop)
        }),
    ])
}

/// Debian 13 with the packages of README.md, the sources of this repository, and the crates that it depends on.
struct Machine {
    installation: Installation,
    workspace: PathBuf,
    target: PathBuf,
    registry: PathBuf,
}

impl Machine {
    fn new() -> Result<Self> {
        let workspace =
            Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests have no workspace")?.to_owned();
        let readme = fs::read_to_string(workspace.join("README.md")).context("cannot read README.md")?;
        let installation = Installation::of(SUITE, &packages(&readme)?)?;
        // The installation uses the crates of this machine, so that it needs no network.
        let mut fetch = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        run(fetch.current_dir(&workspace).args(["fetch", "--locked", "--target", TARGET]))?;
        let home = cargo_home()?;
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("debian-rust");
        fs::create_dir_all(target.join("cargo/registry")).context("cannot make a home for cargo")?;
        fs::create_dir_all(target.join("tmp")).context("cannot make a directory for temporary files")?;
        let configuration = home.join("config.toml");
        if configuration.exists() {
            fs::copy(&configuration, target.join("cargo/config.toml")).context("cannot copy cargo's configuration")?;
        }
        Ok(Self { installation, workspace, target, registry: home.join("registry") })
    }

    /// Checks that `rust-version` is not newer than Debian's Rust.
    fn check_version(&self) -> Result<()> {
        let said = run(self.command("rustc").arg("--version"))?;
        let words = said.split(' ').nth(1).with_context(|| format!("rustc says: {said}"))?;
        let version = |text: &str| -> Vec<u32> { text.split('.').filter_map(|part| part.parse().ok()).collect() };
        let needed = env!("CARGO_PKG_RUST_VERSION");
        ensure!(!needed.is_empty() && version(needed) <= version(words), "rust-version is {needed}, Debian has {said}");
        Ok(())
    }

    fn run_demo(&self) -> Result<()> {
        let output = self.cargo(&["run", "--", "demo", "--json", "--seconds", "0.1"])?;
        let report: Value = serde_json::from_str(&output).context("the demo's report")?;
        let ways = report["ways"].as_array().context("the demo's ways")?;
        let processes: Vec<_> = ways.iter().filter(|way| way["name"] == "process").collect();
        ensure!(!processes.is_empty(), "no process had a ring: {report}");
        ensure!(ways.iter().all(|way| way["errors"] == 0 && way["iops"].as_f64() > Some(0.0)), "{report}");
        Ok(())
    }

    /// Runs Debian's cargo without optimisation: only the compiler's verdict matters.
    fn cargo(&self, arguments: &[&str]) -> Result<String> {
        let (subcommand, rest) = arguments.split_first().context("a subcommand")?;
        let mut command = self.command("cargo");
        command.arg(subcommand).args(["--quiet", "--locked", "--offline"]).args(rest);
        command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "0").env("CARGO_PROFILE_DEV_DEBUG", "false");
        run(command.env("CARGO_INCREMENTAL", "0").env("CARGO_TERM_COLOR", "never"))
    }

    fn command(&self, program: &str) -> Command {
        let mounts =
            [(self.workspace.as_path(), "/src"), (&self.target, "/target"), (&self.registry, "/target/cargo/registry")];
        let mut command = self.installation.command(&mounts, "env");
        command.args(["--chdir=/src", program]);
        let variables = [("CARGO_HOME", "cargo"), ("CARGO_TARGET_DIR", "build"), ("HOME", ""), ("TMPDIR", "tmp")];
        command.envs(variables.map(|(name, directory)| (name, format!("/target/{directory}"))));
        command
    }
}

/// The packages that README.md tells people to install on Debian 13.
fn packages(readme: &str) -> Result<Vec<&str>> {
    let line = readme.lines().find_map(|line| line.strip_prefix("$ sudo apt install "));
    let line = line.context("README.md does not say what to install on Debian")?;
    let packages = line.split('#').next().unwrap_or_default();
    Ok(packages.split_whitespace().collect())
}

fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    let home = env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?;
    Ok(Path::new(&home).join(".cargo"))
}

/// Runs a command to its end, and returns its standard output.
fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
