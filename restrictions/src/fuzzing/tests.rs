//! The fuzz bodies as property tests, and the fuzzer's seeds.

use proptest::{collection::vec, prelude::*, strategy::ValueTree, test_runner::TestRunner};

use super::*;
use crate::BuiltIn;

/// Enough bytes for a policy with all rules and some dozens of SQEs.
const CHOICES_MAX: usize = 300;

/// Saves an input as a seed for a fuzzer in the directory that `cargo xtask` sets in `RINGPASS_FUZZ_SEEDS`. Does
/// nothing without that variable.
fn save_seed(target: &str, name: &str, bytes: &[u8]) {
    let Some(directory) = std::env::var_os("RINGPASS_FUZZ_SEEDS") else { return };
    let directory = std::path::Path::new(&directory).join(target);
    std::fs::create_dir_all(&directory).expect("a directory for the seeds");
    std::fs::write(directory.join(name), bytes).expect("a file for the seed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_checker_agrees_with_the_second_model(bytes in vec(any::<u8>(), 0..CHOICES_MAX)) {
        policy_check(&bytes);
    }

    #[test]
    fn any_text_is_a_policy_that_can_be_written_or_an_error_with_a_position(text in any::<String>()) {
        policy_file(text.as_bytes());
    }
}

#[test]
fn the_arbitrary_policies_and_sqes_reach_every_outcome() {
    let mut runner = TestRunner::deterministic();
    let strategy = vec(any::<u8>(), 0..CHOICES_MAX);
    let (mut total, mut compiled) = (Outcome::default(), 0);
    for number in 0..1_000 {
        let bytes = strategy.new_tree(&mut runner).expect("nothing is filtered").current();
        let outcome = run(&bytes);
        if number < 50 {
            save_seed("policy_check", &format!("arbitrary-{number}"), &bytes);
        }
        total.allowed += outcome.allowed;
        total.refused_by_kernel += outcome.refused_by_kernel;
        total.refused_by_fields += outcome.refused_by_fields;
        compiled += u32::from(outcome.compiled);
    }
    let all = total.allowed + total.refused_by_kernel + total.refused_by_fields;
    for (what, count) in
        [("allowed", total.allowed), ("by the kernel", total.refused_by_kernel), ("by fields", total.refused_by_fields)]
    {
        assert!(count > all / 50, "only {count} {what} of {total:?}");
    }
    assert!((50..950).contains(&compiled), "{compiled} of 1000 policies compile");
}

#[test]
fn the_built_in_files_and_one_with_every_key_are_policy_files() {
    for built_in in BuiltIn::ALL {
        assert!(parse(built_in.file().as_bytes()), "{}", built_in.name());
        save_seed("policy_file", built_in.name(), built_in.file().as_bytes());
    }
    let documentation = include_str!("../file.rs").lines().map_while(|line| line.strip_prefix("//!"));
    let example = documentation.skip_while(|line| *line != " ```toml").skip(1).take_while(|line| *line != " ```");
    let example: String = example.map(|line| format!("{}\n", line.trim_start())).collect();
    assert!(parse(example.as_bytes()), "{example}");
    save_seed("policy_file", "every-key", example.as_bytes());
    assert!(!parse(b"version = 1\n\xff"));
}
