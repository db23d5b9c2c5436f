//! The checker in user space and the kernel give the same verdict on every SQE.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};
use ringpass_broker::kernel;
use ringpass_restrictions::{
    BuiltIn, FieldRules, KernelRules, KernelSupport, Operation, RegisterOperation, RestrictionKind, Sqe, SqeFlags,
    Verdict,
};
use ringpass_tests::{
    differential::{self, Case, Tally},
    harness::{self, test},
    needs::Need,
    seed::Seed,
};

fn main() -> ExitCode {
    let needs = || [Need::io_uring()];
    harness::run(vec![
        test(
            "checker_and_kernel_agree_on_every_opcode_and_flag_under_every_built_in_policy",
            needs(),
            built_in_policies,
        ),
        test(
            "checker_and_kernel_agree_on_every_opcode_and_flag_under_tables_of_one_class",
            needs(),
            tables_of_one_class,
        ),
        test("checker_and_kernel_agree_on_random_sqes_under_random_tables", needs(), random),
        test("the_comparison_finds_a_disagreement", needs(), a_wrong_model_is_found),
        test("checker_and_kernel_agree_on_few_sqes_in_cases_that_shrink", needs(), shrinking),
    ])
}

/// The kernel's restrictions for the policy. The rules on fields are not part of them.
fn table(built_in: BuiltIn, kernel: &KernelSupport) -> Result<Vec<RestrictionKind>> {
    let compiled = built_in.policy().with_fields(FieldRules::default()).compile(kernel)?;
    Ok(compiled.entries().iter().map(|entry| entry.kind()).collect())
}

fn built_in_policies() -> Result<()> {
    let kernel = kernel::support()?;
    for built_in in BuiltIn::ALL {
        let tally = differential::exhaustive(&table(built_in, &kernel)?, &kernel)?;
        let allowed = u64::try_from(built_in.policy().operations().len())?;
        ensure!(tally.cases == 65_536 && tally.allowed == allowed, "{built_in:?}: {tally:?}");
        ensure!(tally.refused_before > 0, "{built_in:?}: {tally:?}");
    }
    Ok(())
}

/// Tables with restrictions of one class: there the semantics before Linux 7.0 and from it on differ.
fn tables_of_one_class() -> Result<()> {
    let kernel = kernel::support()?;
    for entry in [
        RestrictionKind::RegisterOperation(RegisterOperation::REGISTER_PROBE),
        RestrictionKind::Operation(Operation::READ_FIXED),
        RestrictionKind::FlagsAllowed(SqeFlags::FIXED_FILE),
        RestrictionKind::FlagsRequired(SqeFlags::FIXED_FILE),
    ] {
        let tally = differential::exhaustive(&[entry], &kernel)?;
        ensure!(tally.cases == 65_536, "{tally:?}");
    }
    Ok(())
}

fn random() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let cases = harness::budget(10_000_000, 100_000_000);
    let tally = differential::random(seed, cases, &kernel::support()?)?;
    eprintln!("{tally:?}");
    ensure!(tally.cases == cases, "{tally:?}");
    // Without many cases of each kind the comparison would show little.
    for (what, count) in
        [("allowed", tally.allowed), ("by the table", tally.refused_by_table), ("before", tally.refused_before)]
    {
        ensure!(count > cases / 100, "only {count} {what} of {tally:?}");
    }
    Ok(())
}

/// Checks the comparison itself: it finds that a model of another kernel is wrong.
fn a_wrong_model_is_found() -> Result<()> {
    let kernel = kernel::support()?;
    let table = table(BuiltIn::ALL[0], &kernel)?;
    let agrees = |wrong: &KernelSupport| differential::exhaustive(&table, wrong).is_ok();
    ensure!(agrees(&kernel), "the comparison refuses the right model");
    let mut fewer = kernel;
    fewer.numbered.remove(Operation::OPENAT);
    ensure!(!agrees(&fewer), "the comparison accepts a model without an operation that the kernel has");
    let mut select = kernel;
    select.buffer_select.insert(Operation::OPENAT);
    ensure!(!agrees(&select), "the comparison accepts a model in which an operation wrongly takes provided buffers");
    // The model would also find a difference in the table: it allows what a smaller table refuses.
    let read = Sqe { opcode: Operation::READ_FIXED.code(), flags: 1, ..Sqe::default() };
    let rules = KernelRules::of_kinds(table.iter().copied(), &kernel);
    ensure!(rules.check(&read) == Verdict::Allowed, "the model refuses a read");
    Ok(())
}

/// Like `random`, with fewer cases. proptest makes a failing case smaller.
fn shrinking() -> Result<()> {
    let kernel = kernel::support()?;
    let operations: Vec<Operation> = kernel.numbered.iter().collect();
    let register: Vec<RegisterOperation> = kernel.register_operations.iter().collect();
    let flags = || any::<u8>().prop_map(SqeFlags::from_bits_retain);
    let entry = prop_oneof![
        4 => prop::sample::select(operations).prop_map(RestrictionKind::Operation),
        1 => prop::sample::select(register).prop_map(RestrictionKind::RegisterOperation),
        1 => flags().prop_map(RestrictionKind::FlagsAllowed),
        1 => flags().prop_map(RestrictionKind::FlagsRequired),
    ];
    let sqe = (0..80u8, any::<u8>(), any::<[u64; 8]>()).prop_map(|(opcode, flags, words)| Sqe {
        opcode,
        flags,
        ..Sqe::from_words(words)
    });
    let cases = (prop::collection::vec(entry, 1..12), prop::collection::vec(sqe, 1..40));
    let mut config = Config::with_cases(harness::budget(512, 20_000));
    config.failure_persistence = None;
    let mut runner = TestRunner::new(config);
    let result = runner.run(&cases, |(table, sqes)| {
        let mut tally = Tally::default();
        differential::check(&Case { table, sqes }, &kernel, &mut tally)
            .map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    Ok(result?)
}
