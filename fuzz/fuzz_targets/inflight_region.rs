//! An in-flight region as an earlier process or a hostile front-end left it, and the queue that starts from it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringpass_broker::virtqueue::fuzzing::inflight_region(bytes));
