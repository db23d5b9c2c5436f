//! Words that different threads write, kept apart.

/// A value in cache lines of its own: who writes it takes no line away from who reads its neighbours.
///
/// 128 bytes, because x86-64 fetches lines of 64 in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct CacheLine<T>(pub(super) T);
