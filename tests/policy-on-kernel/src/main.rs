//! Prints the results of the policy tests on the running kernel as one line of JSON: the restriction semantics, whether
//! the checker agrees with the kernel, and whether the built-in policies hold.
//!
//! Linked statically, the program runs in guests that have only `/proc` and a writable `/tmp`. Its arguments are the
//! number of SQEs to compare and the number of SQEs that try to escape. The seed is `RINGPASS_SEED`.

use std::{env, process::ExitCode};

use anyhow::{Context, Result};
use ringpass_policy_on_kernel::{
    differential,
    kernel::{self, KernelRelease},
    seed::Seed,
    soundness,
};
use ringpass_restrictions::{BuiltIn, FieldRules, RestrictionSemantics};

fn main() -> ExitCode {
    match run() {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{{\"error\":{:?}}}", format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn number(argument: Option<String>, default: u64, what: &str) -> Result<u64> {
    argument.map_or(Ok(default), |text| text.parse().with_context(|| format!("the number of {what}: {text:?}")))
}

fn run() -> Result<String> {
    let mut arguments = env::args().skip(1);
    let cases = number(arguments.next(), 100_000, "SQEs to compare")?;
    let sqes = number(arguments.next(), 20_000, "SQEs that try to escape")?;
    let seed = Seed::from_env_or_random();
    let kernel = kernel::support().context("cannot ask the kernel what its io_uring can do")?;

    let mut exhaustive = 0;
    for built_in in BuiltIn::ALL {
        let compiled = built_in.policy().with_fields(FieldRules::default()).compile(&kernel)?;
        let table: Vec<_> = compiled.entries().iter().map(|entry| entry.kind()).collect();
        exhaustive += differential::exhaustive(&table, &kernel).with_context(|| built_in.name())?.cases;
    }
    let compared = differential::random(seed, cases, &kernel)?;
    let mut looked = soundness::Outcome::default();
    for policy in soundness::built_in(&kernel)? {
        let outcome = soundness::run(&policy, seed, sqes)?;
        looked.sqes += outcome.sqes;
        looked.executed += outcome.executed;
    }
    let semantics = match kernel.semantics {
        RestrictionSemantics::BeforeLinux7 => "before-linux-7.0",
        RestrictionSemantics::FromLinux7 => "from-linux-7.0",
    };
    Ok(format!(
        "{{\"kernel\":{:?},\"semantics\":{semantics:?},\"operations\":{},\"register_operations\":{},\
         \"exhaustive\":{exhaustive},\"compared\":{},\"tables\":{},\"allowed\":{},\"refused_by_table\":{},\
         \"refused_before\":{},\"disagreements\":0,\"sound_sqes\":{},\"executed\":{},\"seed\":\"{:#x}\"}}",
        KernelRelease::running()?.release(),
        kernel.operations.len(),
        kernel.register_operations.len(),
        compared.cases,
        compared.tables,
        compared.allowed,
        compared.refused_by_table,
        compared.refused_before,
        looked.sqes,
        looked.executed,
        seed.value(),
    ))
}
