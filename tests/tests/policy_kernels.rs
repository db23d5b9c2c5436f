//! On other kernels than this machine's, kernel and checker agree, and no SQE gets out of a built-in policy.

use std::{env, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Result, ensure};
use ringpass_tests::{
    harness::{self, test},
    linux_guest::{self, KernelSeries, LinuxGuestConfig},
    needs::Need,
    policy_kernels::{self, Amount, KERNEL_IMAGE},
    seed::Seed,
};

fn main() -> ExitCode {
    let mut tests = vec![
        test("policies_hold_on_debians_linux_6_1", linux_guest::needs(), || debians(KernelSeries::Linux6_1)),
        test("policies_hold_on_debians_linux_6_12", linux_guest::needs(), || debians(KernelSeries::Linux6_12)),
        test("policies_hold_on_debians_newest_linux", linux_guest::needs(), || debians(KernelSeries::Newest)),
        test("the_static_program_runs_on_this_kernel", vec![Need::io_uring()], this_kernel),
    ];
    // This test exists only if the variable names a kernel.
    if env::var_os(KERNEL_IMAGE).is_some() {
        tests.push(test("policies_hold_on_the_named_kernel", linux_guest::needs(), named_kernel));
    }
    harness::run(tests)
}

fn amount() -> Amount {
    let limit = harness::budget(Duration::from_secs(240), Duration::from_secs(3600));
    Amount { compared: harness::budget(100_000, 1_000_000), sound: harness::budget(10_000, 200_000), limit }
}

fn debians(kernel: KernelSeries) -> Result<()> {
    let release = guest(LinuxGuestConfig { kernel, ..LinuxGuestConfig::default() })?;
    let is_it = match kernel {
        // The first with the other semantics of the restrictions is 7.0.
        KernelSeries::Newest => {
            release.split('.').next().is_some_and(|major| major.parse::<u32>().is_ok_and(|n| n >= 7))
        }
        _ => release.starts_with(&format!("{kernel}.")),
    };
    ensure!(is_it, "the guest runs {release}");
    Ok(())
}

fn named_kernel() -> Result<()> {
    let image = env::var_os(KERNEL_IMAGE).map(PathBuf::from);
    guest(LinuxGuestConfig { kernel_image: image, ..LinuxGuestConfig::default() }).map(drop)
}

fn guest(config: LinuxGuestConfig) -> Result<String> {
    let (seed, amount) = (Seed::from_env_or_random(), amount());
    let report = policy_kernels::in_guest(&policy_kernels::build_program()?, config, amount, seed)?;
    eprintln!("{report:?}");
    report.check(amount)?;
    Ok(report.kernel)
}

fn this_kernel() -> Result<()> {
    let (seed, amount) = (Seed::from_env_or_random(), amount());
    let report = policy_kernels::on_host(&policy_kernels::build_program()?, amount, seed)?;
    report.check(amount)
}
