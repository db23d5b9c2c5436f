//! A disk behind a vhost-user socket.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ringpass_guest_abi::probe::Device;

use super::attachment::WantedRings;
use super::config::{FEATURES, Geometry};
use super::connection::{Connection, Offer};
use super::driver::Driver;
use super::drivers::Drivers;
use super::event_thread::EventThread;
use super::memory::Memory;
use super::queue::Queue;
use super::queue_zero::{News, QueueZero, QueueZeroRequest, SharedQueueZero};
use super::requests::Requests;
use super::virtqueue::Virtqueue;
use super::{Error, Options, Way};
use crate::ram::RamArea;

/// Address of the first region of RAM. It is not 0, so that no address can be mistaken for a missing one.
const RAM_GPA: u64 = 1 << 20;

/// A disk behind a vhost-user socket, for a process that is its own guest.
///
/// If the device is gone, the driver tries to reconnect until the device is back. Requests stay in their queues and
/// continue then. All other calls fail when the device is silent for longer than [`Options::patience`].
///
/// [`close`](Self::close) and the drop stop the queues, and wait at most [`Options::patience`] for the end of their
/// I/O. A device that does not confirm the end keeps the files of the driver's RAM, so that it cannot overwrite other
/// memory of this process later. It may still overwrite [added memory](Self::add_foreign_memory).
#[derive(Debug)]
pub struct Disk {
    // The drop order: first the event thread ends, then the connection stops the queues, then the memory is freed.
    event_thread: EventThread,
    connection: Connection,
    queue_zero: Arc<SharedQueueZero>,
    memory: Arc<Memory>,
    geometry: Geometry,
    options: Options,
    drivers: Arc<Drivers>,
    queue_count: u16,
}

impl Disk {
    /// Connects to the device and sets up its queues.
    ///
    /// # Errors
    ///
    /// No process serves at `path`, the device lacks a feature that this driver needs, or there is no memory.
    pub fn connect(path: impl AsRef<Path>, options: Options) -> Result<Self, Error> {
        let offer = Offer::new(path.as_ref(), &options, FEATURES)?;
        let geometry = Geometry::read(&offer.config, offer.features());
        let memory = Arc::new(Memory::new());
        memory.add(RAM_GPA, options.memory_bytes.next_multiple_of(4096))?;
        let news = Arc::new(News::default());
        let size = 16.max(options.queue_size.min(64));
        let mut queue_zero = QueueZero::new(&memory, size, &geometry, news.clone())?;
        let others = options.queues.min(offer.queue_count.saturating_sub(1));
        let mut queues = Vec::new();
        for _ in 0..others {
            let queue = Virtqueue::new(&memory, options.queue_size)?;
            let requests = Requests::new(&memory, &queue, &geometry)?;
            queues.push((queue, requests));
        }
        let vrings: Vec<_> = queues.iter().map(|(queue, _)| queue.vring().clone()).collect();
        queue_zero.set_other_queues(vrings.clone());
        let all_vrings = std::iter::once(queue_zero.vring().clone()).chain(vrings).collect();
        let connection = offer.start(memory.clone(), all_vrings)?;
        if options.way != Way::Virtqueue {
            queue_zero.probe(options.patience)?;
        }
        let queue_zero = Arc::new(SharedQueueZero::new(queue_zero, news, options.patience));
        let depth = usize::from(options.queue_size / 3).min(options.ring.cq_entries as usize).max(1);
        let drivers = queues.into_iter().zip(1..);
        let drivers =
            drivers.map(|((queue, requests), index)| Driver::new(index, queue_zero.clone(), queue, requests, depth));
        let drivers = Drivers::new(drivers);
        Ok(Self {
            event_thread: EventThread::start(queue_zero.clone(), drivers.clone())?,
            connection,
            queue_zero,
            memory,
            geometry,
            options,
            drivers,
            queue_count: others + 1,
        })
    }

    /// Size and limits of the disk.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The device's description of its rings. `None`: an ordinary disk without rings, or a device that has not answered
    /// yet, because it waits for its disk.
    pub fn offers_rings(&self) -> Option<Device> {
        self.queue_zero.lock().device()
    }

    /// Number of queues in use, including queue 0.
    pub fn queue_count(&self) -> u16 {
        self.queue_count
    }

    /// How often the connection was lost and restored.
    pub fn reconnects(&self) -> u64 {
        self.connection.reconnects()
    }

    /// Takes queue `index`, from 1 on. [`Options::way`] says how the device executes it. The application can take the
    /// queue again after the drop of the [`Queue`], and after this call has failed.
    ///
    /// # Errors
    ///
    /// There is no such queue, another [`Queue`] for it exists, the options demand a ring and the device gives none, or
    /// there is no memory for a ring.
    pub fn queue(&self, index: u16) -> Result<Queue, Error> {
        let mut driver = self.drivers.take(index).ok_or(Error::NoQueue { index, count: self.queue_count })?;
        match self.options.way {
            Way::Virtqueue => {}
            Way::Auto => self.attach(&mut driver)?,
            Way::Ring => {
                self.queue_zero.wait_for_device()?;
                if self.offers_rings().is_none() {
                    return Err(Error::Lacks { what: "rings (`ringpass serve` says why when it starts)" });
                }
                self.attach(&mut driver)?;
                wait_for_ring(&mut driver, self.options.patience)?;
            }
        }
        Ok(Queue::new(driver))
    }

    fn attach(&self, driver: &mut Driver) -> Result<(), Error> {
        driver.want_ring(WantedRings { memory: self.memory.clone(), size: self.options.ring })
    }

    /// Allocates a buffer in the driver's RAM: at least `len_bytes` bytes, in whole pages, which an earlier buffer may
    /// have written. The drop of the buffer returns it to the RAM. A [submitted](Queue::submit) buffer belongs to its
    /// queue until its request has ended, also if the application drops the queue before.
    ///
    /// # Errors
    ///
    /// No free piece of the RAM is long enough: the error says how much is free.
    pub fn allocate(&self, len_bytes: u64) -> Result<RamArea, Error> {
        self.retry_after_progress(|| self.memory.allocate(len_bytes))
    }

    /// Allocates a buffer that starts at a multiple of `align_bytes`, a power of two from 4096 on.
    ///
    /// A request whose buffer crosses a multiple of 4 MiB takes two SQEs, one after the other. [`allocate`](Self::allocate)
    /// avoids that for the buffer as a whole; an application that divides a large buffer into requests aligns it.
    ///
    /// # Errors
    ///
    /// The alignment is not such a power of two, or no free piece of RAM is long enough.
    pub fn allocate_aligned(&self, len_bytes: u64, align_bytes: u64) -> Result<RamArea, Error> {
        self.retry_after_progress(|| self.memory.allocate_aligned(len_bytes, align_bytes))
    }

    /// Allocates a buffer in the region at `gpa`.
    ///
    /// # Errors
    ///
    /// There is no such region, or no free piece of it is long enough.
    pub fn allocate_in(&self, gpa: u64, len_bytes: u64) -> Result<RamArea, Error> {
        self.retry_after_progress(|| self.memory.allocate_in(gpa, len_bytes))
    }

    /// Allocates. If there is no room, tries once more after it has freed the buffers that dropped queues keep and
    /// whose requests have ended meanwhile.
    fn retry_after_progress(&self, allocate: impl Fn() -> Result<RamArea, Error>) -> Result<RamArea, Error> {
        allocate().or_else(|_| {
            self.drivers.progress();
            allocate()
        })
    }

    /// Number of free bytes of the driver's RAM, which need not lie in one piece.
    pub fn free_bytes(&self) -> u64 {
        self.memory.free_bytes()
    }

    /// Adds a region of RAM while the queues run. Requests may name it when this returns. Rings reach it a little
    /// later: until then the driver sends such requests over queue 0.
    ///
    /// # Errors
    ///
    /// The region overlaps another region, or a removed region that has buffers in use, or the device refuses it.
    pub fn add_memory(&self, gpa: u64, len_bytes: u64) -> Result<(), Error> {
        self.connection.add_region(|memory| memory.add(gpa, len_bytes))
    }

    /// Adds the first `len_bytes` bytes of a file that others use, too (the RAM of a virtual machine, a buffer pool): a
    /// memfd, or a file on tmpfs or hugetlbfs, open for reading and writing. The driver allocates nothing from it:
    /// requests name it [by address](Queue::by_address). While there are rings, the device pins it like the other
    /// regions, and no process may discard pages of it.
    ///
    /// # Errors
    ///
    /// The region does not consist of whole pages, is longer than the file or overlaps another region, or the device
    /// refuses it.
    pub fn add_foreign_memory(&self, gpa: u64, file: File, len_bytes: u64) -> Result<(), Error> {
        self.connection.add_region(|memory| memory.add_foreign(gpa, file, len_bytes))
    }

    /// Removes a region of RAM from the device. Requests that name it fail.
    ///
    /// # Errors
    ///
    /// There is no such region, or the device refuses to remove it.
    pub fn remove_memory(&self, gpa: u64) -> Result<(), Error> {
        self.connection.remove_region(gpa)
    }

    /// Makes all completed writes stable.
    ///
    /// # Errors
    ///
    /// The disk fails, or the device is silent.
    pub fn flush(&self) -> Result<(), Error> {
        if self.geometry.has_write_cache { self.queue_zero.execute(&QueueZeroRequest::Flush).map(drop) } else { Ok(()) }
    }

    /// Discards the content of the range.
    ///
    /// # Errors
    ///
    /// The device does not support discards, or not for this range.
    pub fn discard(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), Error> {
        self.in_pieces(
            "discards",
            self.geometry.discard_bytes_max,
            offset_bytes,
            len_bytes,
            |offset_bytes, len_bytes| QueueZeroRequest::Discard { offset_bytes, len_bytes },
        )
    }

    /// Writes zeroes to the range. With `unmap` the device may free the space.
    ///
    /// # Errors
    ///
    /// The device does not support writing zeroes, or not for this range.
    pub fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, unmap: bool) -> Result<(), Error> {
        let max_bytes = self.geometry.write_zeroes_bytes_max;
        self.in_pieces("writing zeroes", max_bytes, offset_bytes, len_bytes, |offset_bytes, len_bytes| {
            QueueZeroRequest::WriteZeroes { offset_bytes, len_bytes, unmap }
        })
    }

    /// Executes requests of at most `max_bytes` until the range is done.
    fn in_pieces(
        &self,
        what: &'static str,
        max_bytes: u64,
        offset_bytes: u64,
        len_bytes: u64,
        piece: impl Fn(u64, u64) -> QueueZeroRequest,
    ) -> Result<(), Error> {
        if max_bytes == 0 {
            return Err(Error::Lacks { what });
        }
        let mut done_bytes = 0;
        while done_bytes < len_bytes {
            let now_bytes = (len_bytes - done_bytes).min(max_bytes);
            self.queue_zero.execute(&piece(offset_bytes + done_bytes, now_bytes))?;
            done_bytes += now_bytes;
        }
        Ok(())
    }

    /// The disk's serial number: at most 20 characters.
    ///
    /// # Errors
    ///
    /// The device does not report it, or is silent.
    pub fn serial(&self) -> Result<String, Error> {
        Ok(self.queue_zero.execute(&QueueZeroRequest::GetId)?.serial())
    }

    /// Replaces the eventfd for the interrupts of queue `index`, like a machine that moves an interrupt. A thread that
    /// waits in [`Queue::wait`] continues to wait, on the new eventfd.
    ///
    /// # Errors
    ///
    /// There is no such queue, or the device refuses the eventfd.
    pub fn move_interrupt(&self, index: u16) -> Result<(), Error> {
        if index >= self.queue_count {
            return Err(Error::NoQueue { index, count: self.queue_count });
        }
        self.connection.renew_call(index.into())
    }

    /// Reconnects. Call this if another process serves the disk now: a process that was killed while its I/O hangs
    /// closes the connection only when the I/O has ended.
    pub fn reconnect(&self) {
        self.connection.cut();
    }

    /// Stops all queues and disconnects from the device. Requests that the driver has not sent are never executed.
    ///
    /// # Errors
    ///
    /// The device does not confirm within [`Options::patience`] that all I/O has ended: it may still use
    /// [added memory](Self::add_foreign_memory).
    pub fn close(self) -> Result<(), Error> {
        let Self { event_thread, mut connection, .. } = self;
        drop(event_thread);
        connection.end()
    }

    /// Stops all queues and starts them again, like a machine that is paused and resumed.
    ///
    /// # Errors
    ///
    /// The device refuses to stop or to start a queue.
    pub fn pause_and_resume(&self) -> Result<(), Error> {
        self.connection.restart_queues()
    }
}

/// Waits until the queue is a ring.
fn wait_for_ring(driver: &mut Driver, patience: Duration) -> Result<(), Error> {
    let begin = Instant::now();
    while !driver.is_ring() {
        driver.progress();
        if let Some(code) = driver.refused() {
            return Err(Error::Refused { code });
        }
        if let Some(fault) = driver.fault() {
            return Err(Error::BrokenDevice(fault.to_string()));
        }
        if begin.elapsed() >= patience {
            return Err(Error::Silent { what: "waiting for a ring", patience });
        }
        thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}
