//! The verifying workload that every ringpass guest can run.
