//! What happens when the process makes a system call that it should not make: it is told in one line, and the call fails.
//!
//! A call that the list lacks by mistake must not end all I/O of a guest, and whoever has taken this process over gains nothing
//! by an error. So it is refused (EPERM), not answered with the end of the process.

use std::ffi::{c_int, c_void};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::libc;
use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use crate::signal_line::Line;

/// Lines at most, of all threads together: enough to find the cause, and not a way to fill a log.
const LINES_MAX: u32 = 64;

static LINES: AtomicU32 = AtomicU32::new(0);

/// From now on a refused call fails with EPERM. Threads must not block SIGSYS: the kernel ends a process that does.
pub(super) fn tell() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, refuse).map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Only what is safe in a signal handler: atomics, the stack, `write(2)`.
extern "C" fn refuse(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a valid `ucontext_t` to a handler with SA_SIGINFO, for this thread alone.
    let context = unsafe { &mut *context };
    let number = refuse_in(context);
    if LINES.fetch_add(1, Ordering::Relaxed) < LINES_MAX {
        let name = usize::try_from(number).ok().and_then(Sysno::new).map_or("of an unknown number", |call| call.name());
        let line = Line::of(format_args!(
            "ringpass: the sandbox refused the system call {name} (EPERM). If the disk suffers from that it is a mistake of ringpass: \
             report it; `--sandbox off` goes without"
        ));
        line.write_to_stderr();
    }
}

/// Has the interrupted call return -EPERM, and gives its number.
#[cfg(target_arch = "x86_64")]
fn refuse_in(context: &mut libc::ucontext_t) -> i64 {
    let rax = &mut context.uc_mcontext.gregs[libc::REG_RAX as usize];
    // The kernel has put the number back that the call was made with (`syscall_rollback`).
    std::mem::replace(rax, i64::from(-libc::EPERM))
}

/// Has the interrupted call return -EPERM, and gives its number.
#[cfg(target_arch = "aarch64")]
fn refuse_in(context: &mut libc::ucontext_t) -> i64 {
    let registers = &mut context.uc_mcontext.regs;
    registers[0] = i64::from(-libc::EPERM) as u64;
    registers[8] as i64
}
