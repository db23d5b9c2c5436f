//! A restriction table and SQEs: the checker against the running kernel.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringpass_policy_on_kernel::fuzzing::policy_kernel(bytes));
