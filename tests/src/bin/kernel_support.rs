//! Runs the policy tests on this machine's kernel and in guests with other kernels, and writes the results as a
//! document. The arguments are the document and further kernels (`bzImage`) for guests. The seed is `RINGPASS_SEED`.

use std::{env, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use ringpass_tests::{
    linux_guest::{KernelSeries, LinuxGuestConfig},
    policy_kernels::{self, Amount},
    seed::Seed,
};

fn main() -> Result<()> {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let path = arguments.next().context("no path for the document")?;
    let seed = Seed::from_env_or_random();
    let amount = Amount { compared: 100_000, sound: 20_000, limit: Duration::from_secs(600) };
    let program = policy_kernels::build_program()?;
    let debians = KernelSeries::ALL.map(|kernel| LinuxGuestConfig { kernel, ..LinuxGuestConfig::default() });
    let others = arguments.map(|image| LinuxGuestConfig { kernel_image: Some(image), ..LinuxGuestConfig::default() });
    let mut reports = Vec::new();
    for config in debians.into_iter().chain(others) {
        reports.push(policy_kernels::in_guest(&program, config, amount, seed)?);
    }
    reports.push(policy_kernels::on_host(&program, amount, seed)?);
    for report in &reports {
        report.check(amount)?;
    }
    policy_kernels::write_document(&path, &reports)
}
