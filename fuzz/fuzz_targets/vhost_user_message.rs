//! One message of a front-end: any header, any body, any number of file descriptors.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringpass_broker::vhost_user::fuzzing::parse_message(bytes));
