//! A vCPU on its own thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::libc::{EAGAIN, EINTR};
use ringpass_bare_metal::map::{CALL_PORT, DOORBELL_GPA, PROGRAM_GPA, RESERVED_END_GPA, block};
use ringpass_bare_metal::{Answer, Attack, BUCKETS, Command, Histogram, MAILBOX_WORDS, MESSAGE_BYTES, TickRate};
use ringpass_workload::Report;
use ringpass_workload::hostile::HostileReport;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use crate::machine::Inner;
use crate::tables::block_offset;
use crate::{Machine, VmmError};

/// Interval of the signals to a vCPU that must stop: a signal between its check of the flag and its entry into the
/// guest has no effect.
const KICK: Duration = Duration::from_millis(1);
/// Time-out for a vCPU to stop: it reacts to the first or second signal, but the machine may be busy.
const STOPPED: Duration = Duration::from_secs(10);
/// Time-out for the program to become ready: it needs a few instructions, but the machine may be busy.
const READY: Duration = Duration::from_secs(10);

/// A vCPU that runs the program. Dropping the value stops the vCPU, whatever it does at that moment.
///
/// The signal `SIGRTMIN` stops the vCPU: the start of the first vCPU replaces the handler of this signal in this
/// process for good. Nothing else in the process may use the signal.
#[derive(Debug)]
pub struct GuestCpu {
    cpu: u32,
    machine: Arc<Inner>,
    tick_rate: TickRate,
    commands: Option<Sender<()>>,
    calls: Receiver<Result<(), VmmError>>,
    busy: bool,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The outcome of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The guest's report.
    pub report: Report,
    /// The requests by latency: pairs of nanoseconds and a count, ascending. The error is at most one part in 512.
    pub latencies: Vec<(u64, u64)>,
}

impl GuestCpu {
    /// Enters the program on a new thread, and waits until it is ready for commands. Takes `SIGRTMIN`.
    ///
    /// # Errors
    ///
    /// [`VmmError::Kick`] if the vCPU could not be stopped again. Otherwise an error of KVM, or the reason why the
    /// program does not become ready.
    pub fn start(machine: &Machine, cpu: u32, vcpu: VcpuFd) -> Result<Self, VmmError> {
        install_kick()?;
        let khz = vcpu.get_tsc_khz().map_err(VmmError::kvm("asking for the time stamp counter's frequency"))?;
        let tick_rate = TickRate::from_khz(khz)
            .ok_or(VmmError::Missing { what: "frequency of the time stamp counter: it reports 0 kHz" })?;
        let (commands, to_do) = mpsc::channel();
        let (called, calls) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let mut runner = Runner { cpu, vcpu, stop: stop.clone(), to_do, called, _machine: machine.inner().clone() };
        let thread = thread::Builder::new()
            .name(format!("vcpu-{cpu}"))
            .spawn(move || runner.run())
            .map_err(|source| VmmError::Thread { cpu, source })?;
        let mut started = Self {
            cpu,
            machine: machine.inner().clone(),
            tick_rate,
            commands: Some(commands),
            calls,
            busy: true,
            stop,
            thread: Some(thread),
        };
        match started.next_answer(Some(READY))? {
            Answer::Ready => Ok(started),
            other => Err(started.failure(other)),
        }
    }

    /// The guest's clock.
    pub fn tick_rate(&self) -> TickRate {
        self.tick_rate
    }

    /// Runs a command and waits for its end.
    pub fn run(&mut self, command: &Command) -> Result<Outcome, VmmError> {
        self.begin(command)?;
        self.finish(None)
    }

    /// Starts a command in the guest.
    pub fn begin(&mut self, command: &Command) -> Result<(), VmmError> {
        if self.busy {
            return Err(VmmError::Busy { cpu: self.cpu, state: "busy with an earlier command" });
        }
        for (index, word) in command.to_words().into_iter().enumerate() {
            self.write(block::COMMAND + index * 8, word)?;
        }
        let sent = self.commands.as_ref().is_some_and(|commands| commands.send(()).is_ok());
        if !sent {
            return Err(VmmError::Stopped { cpu: self.cpu });
        }
        self.busy = true;
        Ok(())
    }

    /// Waits for the end of the command, at most for `timeout` if there is one.
    ///
    /// # Errors
    ///
    /// [`VmmError::NotYet`]: the wait can continue. Otherwise the guest's error, or the reason why the guest stopped.
    pub fn finish(&mut self, timeout: Option<Duration>) -> Result<Outcome, VmmError> {
        match self.next_answer(timeout)? {
            Answer::Done(report) => Ok(Outcome { report, latencies: self.latencies()? }),
            other => Err(self.failure(other)),
        }
    }

    /// Runs the hostile script for `attack` in the guest, and waits for its end.
    pub fn attack(&mut self, attack: Attack) -> Result<HostileReport, VmmError> {
        self.begin(&Command::Hostile(attack))?;
        match self.next_answer(None)? {
            Answer::Attacked(report) => Ok(report),
            other => Err(self.failure(other)),
        }
    }

    /// Takes the vCPU out of the guest for good, whatever it is doing, and ends its thread.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.commands = None;
        let Some(thread) = self.thread.take() else { return };
        let started = Instant::now();
        while !thread.is_finished() {
            if started.elapsed() > STOPPED {
                // The thread continues, in memory that it keeps alive. Removing the memory slots ends it.
                tracing::error!(cpu = self.cpu, waited = ?STOPPED, "a vCPU does not stop: its thread stays behind");
                return;
            }
            // The error of pthread_kill is ignored: it can only mean that the thread has ended. Then the loop ends,
            // too, as it does if the signal does not arrive.
            _ = thread.kill(SIGRTMIN());
            thread::sleep(KICK);
        }
        if thread.join().is_err() {
            tracing::error!("the thread of a vCPU panicked");
        }
    }

    fn next_answer(&mut self, timeout: Option<Duration>) -> Result<Answer, VmmError> {
        let cpu = self.cpu;
        if !self.busy {
            return Err(VmmError::Busy { cpu, state: "not at work" });
        }
        let call = match timeout {
            None => self.calls.recv().map_err(|_| VmmError::Stopped { cpu })?,
            Some(waited) => match self.calls.recv_timeout(waited) {
                Ok(call) => call,
                Err(RecvTimeoutError::Timeout) => return Err(VmmError::NotYet { cpu, waited }),
                Err(RecvTimeoutError::Disconnected) => return Err(VmmError::Stopped { cpu }),
            },
        };
        self.busy = false;
        call?;
        // Copy once, then check the copy: the guest may continue to write.
        let mut words = [0; MAILBOX_WORDS];
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.read(block::ANSWER + index * 8)?;
        }
        Ok(Answer::from_words(&words))
    }

    fn failure(&self, answer: Answer) -> VmmError {
        let cpu = self.cpu;
        let message = || self.message().unwrap_or_else(|error| error.to_string());
        match answer {
            Answer::Refused => VmmError::Refused { cpu, message: message() },
            Answer::Panicked => VmmError::Panicked { cpu, message: message() },
            Answer::Unknown(kind) => VmmError::BadAnswer { cpu, kind },
            Answer::Ready | Answer::Done(_) | Answer::Attacked(_) => {
                VmmError::Busy { cpu, state: "at another command than it was given" }
            }
        }
    }

    fn latencies(&self) -> Result<Vec<(u64, u64)>, VmmError> {
        let mut latencies = Vec::new();
        for bucket in 0..BUCKETS {
            let count: u64 = self.read(block::HISTOGRAM + bucket * 8)?;
            if count != 0 {
                latencies.push((Histogram::latency_ns(bucket), count));
            }
        }
        Ok(latencies)
    }

    /// The text that accompanies an answer.
    fn message(&self) -> Result<String, VmmError> {
        let mut text = [0; MESSAGE_BYTES];
        self.machine
            .program()
            .read_slice(&mut text, self.address(block::MESSAGE))
            .map_err(VmmError::memory("reading the guest's message"))?;
        let len = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        Ok(String::from_utf8_lossy(&text[..len]).into_owned())
    }

    fn address(&self, offset: usize) -> GuestAddress {
        GuestAddress(PROGRAM_GPA + block_offset(self.cpu) + offset as u64)
    }

    fn read(&self, offset: usize) -> Result<u64, VmmError> {
        self.machine.program().read_obj(self.address(offset)).map_err(VmmError::memory("reading a vCPU's block"))
    }

    fn write(&self, offset: usize, value: u64) -> Result<(), VmmError> {
        self.machine
            .program()
            .write_obj(value, self.address(offset))
            .map_err(VmmError::memory("writing a vCPU's block"))
    }
}

impl Drop for GuestCpu {
    fn drop(&mut self) {
        self.end();
    }
}

/// The state of the thread.
struct Runner {
    cpu: u32,
    vcpu: VcpuFd,
    stop: Arc<AtomicBool>,
    to_do: Receiver<()>,
    called: Sender<Result<(), VmmError>>,
    /// The memory that the vCPU runs in.
    _machine: Arc<Inner>,
}

impl Runner {
    /// Runs the guest from call to call, until it must stop or cannot continue.
    fn run(&mut self) {
        // A thread inherits the signals that its creator blocks, and a blocked signal does not end KVM_RUN.
        if let Err(error) = unblock_signal(SIGRTMIN()) {
            _ = self.called.send(Err(VmmError::Kick { source: std::io::Error::other(error.to_string()) }));
            return;
        }
        while !self.stop.load(Ordering::Relaxed) {
            let exit = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(CALL_PORT, _)) => {
                    if self.called.send(Ok(())).is_err() || self.to_do.recv().is_err() {
                        return;
                    }
                    continue;
                }
                // The doorbell of a queue that is gone.
                Ok(VcpuExit::IoOut(..)) => continue,
                Ok(VcpuExit::MmioWrite(DOORBELL_GPA..RESERVED_END_GPA, _)) => continue,
                Ok(VcpuExit::MmioRead(gpa, _)) => {
                    format!("it reads from an address without memory or device, {gpa:#x}")
                }
                Ok(VcpuExit::MmioWrite(gpa, _)) => {
                    format!("it writes to an address without memory or device, {gpa:#x}")
                }
                Ok(exit) => format!("{exit:?}"),
                // The kick (see `stop`), or another signal.
                Err(error) if matches!(error.errno(), EINTR | EAGAIN) => continue,
                Err(error) => error.to_string(),
            };
            let registers = self.vcpu.get_regs().map(|regs| format!("rip {:#x}, rsp {:#x}", regs.rip, regs.rsp));
            let system =
                self.vcpu.get_sregs().map(|sregs| format!("cs {:#x}, cr2 {:#x}", sregs.cs.selector, sregs.cr2));
            let part = |part: Result<String, kvm_ioctls::Error>| part.unwrap_or_else(|error| error.to_string());
            let exit = format!("{exit} ({}, {})", part(registers), part(system));
            // If the receiver is gone, it does not need the message.
            _ = self.called.send(Err(VmmError::Exit { cpu: self.cpu, exit }));
            return;
        }
    }
}

/// Installs a handler for the kick: an ignored signal would not interrupt KVM_RUN, and the default action ends the
/// process.
fn install_kick() -> Result<(), VmmError> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    extern "C" fn nothing(_: i32, _: *mut nix::libc::siginfo_t, _: *mut nix::libc::c_void) {}
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*installed {
        register_signal_handler(SIGRTMIN(), nothing).map_err(|error| VmmError::Kick { source: error.into() })?;
        *installed = true;
    }
    Ok(())
}
