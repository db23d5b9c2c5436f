//! Tests of split virtqueues, and their common driver.

mod chain;
mod crash;
mod dirty_log;
mod driver;
mod inflight;
mod queue;
