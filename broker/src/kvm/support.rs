//! What this machine's KVM can do.
