//! Ctrl-C: what is under way ends, and the program says how far it came.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use vmm_sys_util::signal::register_signal_handler;

static IS_INTERRUPTED: AtomicBool = AtomicBool::new(false);

const SIGINT: c_int = 2;
const SIGTERM: c_int = 15;

/// From now on SIGINT and SIGTERM are noticed by [`check`].
pub(crate) fn watch() -> Result<()> {
    for signal in [SIGINT, SIGTERM] {
        register_signal_handler(signal, note).context("catching Ctrl-C")?;
    }
    Ok(())
}

/// # Errors
///
/// The program is to end.
pub(crate) fn check(moved_bytes: u64) -> Result<()> {
    ensure!(!IS_INTERRUPTED.load(Ordering::Relaxed), "interrupted after {moved_bytes} bytes");
    Ok(())
}

extern "C" fn note<Info>(_signal: c_int, _info: *mut Info, _context: *mut c_void) {
    IS_INTERRUPTED.store(true, Ordering::Relaxed);
}
