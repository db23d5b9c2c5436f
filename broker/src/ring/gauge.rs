//! How many requests a ring has outstanding, by the kernel's own count.
//!
//! The indexes in the ring's memory are the guest's to overwrite. The kernel keeps copies of its own, and shows them in
//! `/proc/self/fdinfo` (`io_uring/fdinfo.c`, lines `CachedSqHead` and `CachedCqTail`): the SQEs that it has consumed,
//! and the CQEs that it has put into the CQ. The difference is what is under way, and what did not fit the CQ.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};

use crate::ring_fd::RingFd;

/// The text begins with the indexes. What follows, the fixed buffers and the completions without room, can have
/// megabytes.
const INDEXES_BYTES: usize = 1024;

/// Counts the outstanding requests of a ring that runs. It does not keep the ring open.
#[derive(Debug)]
pub struct RingGauge {
    ring: Weak<RingFd>,
    /// The ring's file in `/proc/self/fdinfo`. It stays open, because the kernel then keeps the buffer for the text.
    /// While it has to enlarge the buffer it begins again each time, and needs the ring's lock each time.
    fdinfo: File,
}

/// What a [`RingGauge`] shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GaugeReading {
    /// The ring is closed.
    Closed,
    /// The kernel does not tell now: the ring is in the middle of a batch. It may tell at the next attempt.
    Busy,
    /// SQEs consumed without a CQE in the CQ: under way, or complete without room in the CQ.
    Outstanding(u32),
}

impl RingGauge {
    pub(super) fn new(ring: &Arc<RingFd>) -> io::Result<Self> {
        let fdinfo = File::open(format!("/proc/self/fdinfo/{}", ring.raw()))?;
        Ok(Self { ring: Arc::downgrade(ring), fdinfo })
    }

    /// Whether the ring is closed.
    pub fn is_closed(&self) -> bool {
        self.ring.strong_count() == 0
    }

    /// Asks the kernel. This takes some microseconds for [`GaugeReading::Busy`], and 0.05 to 10 ms otherwise: the kernel
    /// also lists each fixed buffer (about 0.6 us for each) and each completion that did not fit the CQ. It holds the
    /// lock of the ring meanwhile, so the ring takes no SQEs.
    ///
    /// # Errors
    ///
    /// `/proc` cannot be read.
    pub fn read(&self) -> io::Result<GaugeReading> {
        // Holding the ring keeps its descriptor from becoming that of another file.
        let Some(_ring) = self.ring.upgrade() else { return Ok(GaugeReading::Closed) };
        let mut text = [0; INDEXES_BYTES];
        let len_bytes = self.fdinfo.read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(&text[..len_bytes]);
        Ok(outstanding(&text).map_or(GaugeReading::Busy, GaugeReading::Outstanding))
    }
}

/// `None`: the kernel did not get the ring's lock, so the text has only what is true of every file.
/// (Before Linux 6.13 the kernel needs no lock for the indexes.)
fn outstanding(fdinfo: &str) -> Option<u32> {
    let value = |name: &str| -> Option<u32> {
        let rest = fdinfo.lines().find_map(|line| line.strip_prefix(name))?;
        rest.trim().parse().ok()
    };
    // Both wrap. Before Linux 6.13 the kernel reads them without the lock, so a request may end in between.
    let difference = value("CachedSqHead:")?.wrapping_sub(value("CachedCqTail:")?) as i32;
    Some(difference.max(0) as u32)
}

#[cfg(test)]
mod tests {
    use rustix::io_uring::io_uring_params;

    use super::*;

    #[test]
    fn the_difference_of_the_kernel_s_indexes_is_outstanding_and_may_wrap() {
        let text = |head: u32, tail: u32| {
            format!(
                "pos:\t0\nflags:\t02000002\nSqMask:\t0x3f\nSqHead:\t7\nCachedSqHead:\t{head}\nCqHead:\t9\nCachedCqTail:\t{tail}\n"
            )
        };
        assert_eq!(outstanding(&text(10, 4)), Some(6));
        assert_eq!(outstanding(&text(1, u32::MAX)), Some(2));
        assert_eq!(outstanding(&text(4, 5)), Some(0), "a request ended between the two indexes");
        assert_eq!(outstanding("pos:\t0\nflags:\t02000002\n"), None, "the kernel does not have the ring's lock");
    }

    #[test]
    fn an_idle_ring_has_nothing_outstanding_and_a_closed_ring_is_closed() {
        let ring = Arc::new(RingFd::setup(4, &mut io_uring_params::default()).unwrap());
        let gauge = RingGauge::new(&ring).unwrap();
        assert_eq!(gauge.read().unwrap(), GaugeReading::Outstanding(0));
        assert!(!gauge.is_closed());
        drop(ring);
        assert_eq!(gauge.read().unwrap(), GaugeReading::Closed);
        assert!(gauge.is_closed());
    }
}
