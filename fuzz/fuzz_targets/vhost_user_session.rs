//! A session with a front-end that sends messages in any order, with right and wrong values and file descriptors.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringpass_broker::vhost_user::fuzzing::run_session(bytes));
