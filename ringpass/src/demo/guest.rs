//! A process as a guest: the guest's side.
//!
//! The guest process has its RAM, a doorbell, an eventfd for interrupts, and a socket on standard input, over which the
//! broker sends tasks. It has neither the disk nor an io_uring that it created itself.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::Context;
use ringpass_guest::{GuestRam, RamRing, handover};
use ringpass_guest_abi::DriverRing;
use ringpass_workload::{Job, ProcessEnv, RingQueue};
use rustix::process::{Signal, set_parent_process_death_signal};

use super::{BUFFERS_BYTES, Outcome, Task, perform};

/// The argument with which [`super::process`] starts this program as a guest.
pub(super) const COMMAND: &str = "demo-guest";

/// Whether this process was started as a guest.
pub(crate) fn is_wanted() -> bool {
    let mut arguments = std::env::args_os().skip(1);
    arguments.next().is_some_and(|word| word == COMMAND) && arguments.next().is_none()
}

/// Runs the broker's tasks until the broker closes the socket.
pub(crate) fn run() -> anyhow::Result<()> {
    // The socket closes when the broker is killed, but a guest in the middle of a task would wait half a minute for its
    // requests.
    set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot ask the kernel to kill this process with the broker")?;
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("standard input is not the broker's socket")?;
    let stream = UnixStream::from(socket);
    let mut handover = handover::receive(&stream).context("this program is started by `ringpass demo`")?;
    let (Some(setup), Some(events)) = (handover.setup.queues.pop(), handover.events.pop()) else {
        anyhow::bail!("a checked setup has a queue");
    };

    // SAFETY: the broker shares this RAM only with this process and the kernel. The kernel touches it only for requests
    // of this process, and the broker does not touch it.
    let ram = Arc::new(unsafe { GuestRam::map(&handover.regions()) }?);
    let mut allocator = ram.allocator()?;
    let ring: RamRing = allocator.ring(setup.rings_gpa, &setup.layout, setup.sqes_gpa)?;
    let buffers = allocator.allocate(BUFFERS_BYTES)?;
    let buffers_gpa = buffers.gpa();
    let addressing = handover.setup.addressing()?;
    let mut queue = RingQueue::new(DriverRing::new(ring, setup.layout)?, addressing);
    let mut environment = ProcessEnv::new(buffers, events.doorbell, events.completion);

    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let Some(first) = lines.next() else { return Ok(()) };
    let mut expected: Vec<u64> = serde_json::from_str(&first?)?;
    for line in lines {
        let task: Task = serde_json::from_str(&line?)?;
        let task = Task { job: Job { buffers_gpa, ..task.job }, ..task };
        let report = perform(task, &mut queue, &mut environment, &mut expected)?;
        let latencies = super::pairs(&environment.take_latencies_ns()?);
        let mut answer = serde_json::to_vec(&Outcome { report, latencies, exits: None })?;
        answer.push(b'\n');
        (&stream).write_all(&answer)?;
    }
    Ok(())
}
