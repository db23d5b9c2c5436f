//! A request of a hostile driver: any descriptor chain.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringpass_broker::virtio_blk::fuzzing::parse_chain(bytes));
