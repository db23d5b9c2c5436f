//! The text of a policy file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringpass_restrictions::fuzzing::policy_file(bytes));
