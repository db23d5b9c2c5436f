//! The ringpass guest driver for a process that is its own guest.
