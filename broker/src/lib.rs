//! The ringpass broker: gives guests io_uring rings in their own memory.
