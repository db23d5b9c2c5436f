//! Benchmarks of ringpass.
