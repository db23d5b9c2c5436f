//! Whether a program that begins to serve a disk can go on, when somebody else has the disk.

use std::thread;
use std::time::{Duration, Instant};

use super::acquire::{Attempt, BackOff};
use super::lease::Looks;
use super::{Disk, DiskError, LocatedDisk};

/// What [`LocatedDisk::start_up`] is to do when somebody else has the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartUp {
    /// Give up if a living process still has it after that time. If no process does, it is I/O of one that has ended:
    /// go on, and the disk is had when that I/O has ended.
    Grace(Duration),
    /// Go on at once, and leave the disk alone until [`DiskLease::acquire`](super::DiskLease::acquire) is called, because a guest
    /// runs here: the destination of a live migration. The source gives the disk back whenever it may be about to lose the
    /// guest, and wants it again if the guest stays.
    Incoming,
}

/// How a start goes on: for [`DiskLease::begin`](super::DiskLease::begin).
#[derive(Debug)]
pub enum Start {
    /// With the disk.
    Has(Disk),
    /// I/O of a process that has ended has the disk: it is to be waited for.
    Waits,
    /// Without the disk, until it is asked for.
    Later,
}

impl LocatedDisk {
    /// Waits until it is clear that a program can go on. Who has the disk is seen in `/proc`: call it before a sandbox hides
    /// other processes.
    ///
    /// # Errors
    ///
    /// A living process still has the disk ([`DiskError::Locked`], [`DiskError::InUse`]), or it cannot be opened.
    pub fn start_up(&self, how: StartUp) -> Result<Start, DiskError> {
        let StartUp::Grace(grace) = how else { return Ok(Start::Later) };
        let begin = Instant::now();
        let (mut acquisition, mut looks, mut back_off) = (self.acquisition(), Looks::new(begin), BackOff::default());
        loop {
            if let Attempt::Got(disk) = acquisition.attempt()? {
                return Ok(Start::Has(disk));
            }
            let is_over = begin.elapsed() >= grace;
            if looks.is_due() || is_over {
                let obstacle = acquisition.obstacle(begin.elapsed());
                if !obstacle.names_living_holder() {
                    return Ok(Start::Waits);
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
