//! Refused system calls: the call fails, and a line on standard error names it.
//!
//! A call that the list lacks by mistake must not end all I/O of a guest, and an attacker in this process gains nothing
//! by an error. So the sandbox refuses the call (EPERM) rather than ending the process.

use std::ffi::{c_int, c_void};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::libc;
use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use super::Role;
use crate::signal_line::Line;

/// The most lines, of all threads together: enough to find the cause, too few to fill a log.
const LINES_MAX: u32 = 64;

static LINES: AtomicU32 = AtomicU32::new(0);
/// Lines of both processes of a server are in the same log.
static IS_RING_PROCESS: AtomicBool = AtomicBool::new(false);

/// From now on a refused call fails with EPERM. Threads must not block SIGSYS: the kernel would end the process.
pub(super) fn install_handler(role: Role) -> io::Result<()> {
    IS_RING_PROCESS.store(role == Role::RingProcess, Ordering::Relaxed);
    register_signal_handler(libc::SIGSYS, refuse).map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Uses only what is safe in a signal handler: atomics, the stack, `write(2)`.
extern "C" fn refuse(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a valid `ucontext_t` to a handler with SA_SIGINFO, for this thread alone.
    let context = unsafe { &mut *context };
    let number = refuse_in(context);
    if LINES.fetch_add(1, Ordering::Relaxed) < LINES_MAX {
        let name = usize::try_from(number).ok().and_then(Sysno::new).map_or("of an unknown number", |call| call.name());
        let place = if IS_RING_PROCESS.load(Ordering::Relaxed) { " in the ring process" } else { "" };
        let line = Line::of(format_args!(
            "ringpass: the sandbox refused the system call {name} (EPERM){place}. If the disk has problems since, \
             this is a bug of ringpass: report it; `--sandbox off` serves without the sandbox"
        ));
        line.write_to_stderr();
    }
}

/// Makes the interrupted call return -EPERM, and returns its number.
#[cfg(target_arch = "x86_64")]
fn refuse_in(context: &mut libc::ucontext_t) -> i64 {
    let rax = &mut context.uc_mcontext.gregs[libc::REG_RAX as usize];
    // The kernel has restored the number of the call (`syscall_rollback`).
    std::mem::replace(rax, i64::from(-libc::EPERM))
}

/// Makes the interrupted call return -EPERM, and returns its number.
#[cfg(target_arch = "aarch64")]
fn refuse_in(context: &mut libc::ucontext_t) -> i64 {
    let registers = &mut context.uc_mcontext.regs;
    registers[0] = i64::from(-libc::EPERM) as u64;
    registers[8] as i64
}
