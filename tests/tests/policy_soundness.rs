//! Under a policy without lint errors no SQE with any bytes changes anything outside of its disk and its memory.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use ringpass_broker::kernel;
use ringpass_restrictions::{Access, LintContext, Mode, Operation, Policy, Severity};
use ringpass_tests::{
    harness::{self, test},
    needs::Need,
    seed::Seed,
    soundness,
};

fn main() -> ExitCode {
    let needs = || [Need::io_uring()];
    harness::run(vec![
        test("no_sqe_gets_out_of_a_built_in_policy", needs(), built_in_policies),
        test("no_sqe_gets_out_of_any_policy_without_lint_errors", needs(), policies_without_errors),
        test("the_test_finds_an_sqe_that_gets_out", needs(), a_wrong_policy_is_found),
    ])
}

fn built_in_policies() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let sqes = harness::budget(50_000, 5_000_000);
    for policy in soundness::built_in(&kernel::support()?)? {
        let errors = policy.policy().lint(&kernel::lint_context(Mode::Direct, policy.semantics()));
        ensure!(errors.iter().all(|finding| finding.severity < Severity::Error), "{errors:?}");
        let outcome = soundness::run(&policy, seed, sqes)?;
        eprintln!("{outcome:?}");
        // Without these the test would have tried little of what could go wrong.
        ensure!(outcome.executed > sqes / 50, "{outcome:?}");
    }
    Ok(())
}

/// Random policies with all flags and operations that the lint accepts, not only the built-in ones.
fn policies_without_errors() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let (policies, sqes) = harness::budget((100, 1_000), (1_000, 10_000));
    let support = kernel::support()?;
    let nop = kernel::lint_context(Mode::Direct, support.semantics).nop;
    let mut rng = seed.derive("policies").rng();
    let mut executed = 0;
    for _ in 0..policies {
        let policy = soundness::any_without_errors(&mut rng, &support, nop)?;
        let outcome = soundness::run(&policy, seed, sqes).with_context(|| format!("{:?}", policy.policy()))?;
        executed += outcome.executed;
    }
    eprintln!("{policies} policies, the kernel executed {executed} of {} SQEs", policies * sqes);
    ensure!(executed > policies * sqes / 100, "the kernel executed only {executed} SQEs");
    Ok(())
}

/// The same with a policy that the lint finds unsafe. (A policy without the fixed-file rule would read the terminal and
/// wait. The tests of hostile guests do that, in a process of their own.)
fn a_wrong_policy_is_found() -> Result<()> {
    let policy = Policy::direct(Access::ReadOnly).allow(Operation::READ);
    let findings = policy.lint(&LintContext::for_any_kernel(&policy));
    ensure!(findings.iter().any(|finding| finding.severity == Severity::Error), "{findings:?}");
    let compiled = policy.compile(&kernel::support()?)?;
    let damage = soundness::run(&compiled, Seed::fixed(7), 1_000_000).err().context("no damage was found")?;
    let damage = format!("{damage:#}");
    ensure!(damage.contains("damage: ") || damage.contains("is changed"), "{damage}");
    Ok(())
}
