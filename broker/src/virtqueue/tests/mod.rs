//! Tests of split virtqueues, and the driver that they have in common.

mod chain;
mod crash;
mod dirty_log;
mod driver;
mod inflight;
mod queue;
