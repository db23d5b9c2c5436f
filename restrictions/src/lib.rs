//! Restriction policies for io_uring rings with untrusted submitters.
