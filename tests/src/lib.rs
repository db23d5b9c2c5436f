//! End-to-end tests of ringpass.
