//! Tests of split virtqueues, and their common driver.

mod chain;
mod crash;
mod device_record;
mod dirty_log;
mod driver;
mod inflight;
mod popped_chain;
mod queue;
