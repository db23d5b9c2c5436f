//! System calls in another process (`ptrace(2)`), as code that has taken the process over would make them. x86_64 only.

use std::{fs::File, io, mem::MaybeUninit, os::unix::fs::FileExt, ptr};

use anyhow::{Context, Result, bail, ensure};
use nix::libc::{self, c_long, pid_t, user_regs_struct};
use rustix::io::Errno;

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// `orig_rax` of a thread that is in no system call, so that the kernel restarts none.
const NO_CALL: u64 = u64::MAX;
const PAGE_BYTES: u64 = 4096;

/// A thread that stands still in a system call of its own. The drop lets it go on with that call.
pub(crate) struct Tracee {
    tid: pid_t,
    memory: File,
    before: user_regs_struct,
}

/// What became of a call.
pub(crate) type Answer = Result<u64, Errno>;

impl Tracee {
    /// Stops the main thread of a process, which waits in a system call.
    pub(crate) fn stop(pid: u32) -> Result<Self> {
        let tid = pid_t::try_from(pid)?;
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        request(libc::PTRACE_SEIZE, tid, 0).context("PTRACE_SEIZE")?;
        request(libc::PTRACE_INTERRUPT, tid, 0).context("PTRACE_INTERRUPT")?;
        wait_for_stop(tid)?;
        let before = registers(tid)?;
        let tracee = Self { tid, memory, before };
        ensure!(tracee.read::<2>(before.rip - 2)? == SYSCALL, "the thread is in no system call");
        Ok(tracee)
    }

    /// Makes a system call. The sandbox's refusal is EPERM.
    pub(crate) fn call(&self, number: c_long, arguments: &[u64]) -> Result<Answer> {
        let argument = |place: usize| arguments.get(place).copied().unwrap_or(0);
        let mut regs = self.before;
        regs.rip -= 2;
        regs.orig_rax = NO_CALL;
        regs.rax = u64::try_from(number)?;
        (regs.rdi, regs.rsi, regs.rdx) = (argument(0), argument(1), argument(2));
        (regs.r10, regs.r8, regs.r9) = (argument(3), argument(4), argument(5));
        set_registers(self.tid, &regs)?;
        request(libc::PTRACE_SINGLESTEP, self.tid, 0).context("PTRACE_SINGLESTEP")?;
        match wait_for_stop(self.tid)? {
            // seccomp: the handler of the signal would log the call and return this error.
            libc::SIGSYS => {
                // The end of the step is reported as well. If it were not, one more instruction would run, which at most
                // compares the result.
                request(libc::PTRACE_SINGLESTEP, self.tid, 0).context("PTRACE_SINGLESTEP")?;
                let signal = wait_for_stop(self.tid)?;
                ensure!(signal == libc::SIGTRAP, "signal {signal} after a refused system call");
                Ok(Err(Errno::PERM))
            }
            libc::SIGTRAP => {
                let result = registers(self.tid)?.rax as i64;
                Ok(if (-4095..0).contains(&result) {
                    Err(Errno::from_raw_os_error(i32::try_from(-result)?))
                } else {
                    Ok(result as u64)
                })
            }
            signal => bail!("signal {signal} after a system call"),
        }
    }

    /// Maps empty pages.
    pub(crate) fn map(&self, pages: u64) -> Result<u64> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let arguments = [0, pages * PAGE_BYTES, access as u64, flags as u64, u64::MAX, 0];
        self.call(libc::SYS_mmap, &arguments)?.context("mmap")
    }

    pub(crate) fn read<const LEN: usize>(&self, address: u64) -> Result<[u8; LEN]> {
        let mut bytes = [0; LEN];
        self.memory.read_exact_at(&mut bytes, address).context("reading memory of the process")?;
        Ok(bytes)
    }

    pub(crate) fn read_u32(&self, address: u64) -> Result<u32> {
        Ok(u32::from_le_bytes(self.read(address)?))
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.memory.write_all_at(bytes, address).context("writing memory of the process")
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        let _ = set_registers(self.tid, &self.before);
        let _ = request(libc::PTRACE_DETACH, self.tid, 0);
    }
}

fn request(request: libc::c_uint, tid: pid_t, data: usize) -> io::Result<()> {
    // SAFETY: these requests take a number as data, and no address of this process.
    let result = unsafe { libc::ptrace(request, tid, ptr::null_mut::<u8>(), data) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn registers(tid: pid_t) -> Result<user_regs_struct> {
    let mut regs = MaybeUninit::<user_regs_struct>::zeroed();
    // SAFETY: the kernel stores the registers in the live value that the pointer leads to.
    let result = unsafe { libc::ptrace(libc::PTRACE_GETREGS, tid, ptr::null_mut::<u8>(), regs.as_mut_ptr()) };
    ensure!(result == 0, "PTRACE_GETREGS: {}", io::Error::last_os_error());
    // SAFETY: integers, zeroed at first and then stored by the kernel.
    Ok(unsafe { regs.assume_init() })
}

fn set_registers(tid: pid_t, regs: &user_regs_struct) -> Result<()> {
    // SAFETY: the kernel reads the registers from a live value.
    let result = unsafe { libc::ptrace(libc::PTRACE_SETREGS, tid, ptr::null_mut::<u8>(), ptr::from_ref(regs)) };
    ensure!(result == 0, "PTRACE_SETREGS: {}", io::Error::last_os_error());
    Ok(())
}

/// Waits until the thread stands still, and returns the signal that stopped it.
fn wait_for_stop(tid: pid_t) -> Result<i32> {
    let mut status = 0;
    // SAFETY: the kernel stores the status in a live integer.
    let waited = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
    ensure!(waited == tid, "waitpid: {}", io::Error::last_os_error());
    ensure!(libc::WIFSTOPPED(status), "the process has ended: {status:#x}");
    Ok(libc::WSTOPSIG(status))
}
