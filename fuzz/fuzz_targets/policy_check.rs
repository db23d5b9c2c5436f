//! A policy, a kernel and SQEs: the checker against a second model.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringpass_restrictions::fuzzing::policy_check(bytes));
