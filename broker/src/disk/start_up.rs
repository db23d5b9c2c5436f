//! Whether a program that starts to serve a disk can continue while another process has the disk.

use std::thread;
use std::time::{Duration, Instant};

use super::acquire::{Attempt, BackOff};
use super::looks::Looks;
use super::{Disk, DiskError, LocatedDisk};

/// What [`LocatedDisk::start_up`] does when another process has the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartUp {
    /// Give up if a living process still has the disk after that time. If no living process has it, the holder is I/O
    /// of a process that has ended: continue, and acquire the disk when that I/O has ended.
    Grace(Duration),
    /// Continue at once, and leave the disk alone until [`DiskLease::acquire`](super::DiskLease::acquire) is called,
    /// because then a guest runs here: the destination of a live migration. The source releases the disk whenever it
    /// may be about to lose the guest, and acquires it again if the guest stays.
    Incoming,
}

/// The disk of a program that starts: for [`DiskLease::begin`](super::DiskLease::begin).
#[derive(Debug)]
pub enum DiskAtStart {
    /// The program has the disk.
    Acquired(Disk),
    /// I/O of an ended process still holds the disk: the lease waits for it.
    Awaited,
    /// The program does without the disk until [`DiskLease::acquire`](super::DiskLease::acquire) asks for it.
    NotRequested,
}

impl LocatedDisk {
    /// Waits until it is clear whether a program can continue. `/proc` shows the disk's holder, so call this before a
    /// sandbox hides other processes.
    ///
    /// # Errors
    ///
    /// A living process still has the disk or its storage ([`DiskError::is_busy`]), or the disk cannot be opened.
    pub fn start_up(&self, how: StartUp) -> Result<DiskAtStart, DiskError> {
        let StartUp::Grace(grace) = how else { return Ok(DiskAtStart::NotRequested) };
        let begin = Instant::now();
        let (mut acquisition, mut looks, mut back_off) = (self.acquisition(), Looks::new(begin), BackOff::default());
        loop {
            if let Attempt::Got(disk) = acquisition.attempt()? {
                return Ok(DiskAtStart::Acquired(disk));
            }
            let is_over = begin.elapsed() >= grace;
            if looks.is_due() || is_over {
                let obstacle = acquisition.obstacle(begin.elapsed());
                if !obstacle.names_living_holder() {
                    return Ok(DiskAtStart::Awaited);
                }
                if is_over {
                    return Err(obstacle);
                }
                looks.report(&obstacle);
            }
            thread::sleep(back_off.next().min(grace.saturating_sub(begin.elapsed())));
        }
    }
}
