//! The host kernel: rings, and their I/O on the disk.

use ringpass_guest_abi::epoch::Area;

use crate::explore::Label;
use crate::list::List;
use crate::model::{Broken, REQUESTS, System};

/// A ring, from its set-up until it accesses no memory any more.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Ring {
    pub(crate) area: Area,
    pub(crate) life: Life,
    sq_head: u8,
    /// Requests whose I/O may happen at any moment.
    in_flight: [bool; REQUESTS],
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Life {
    Live,
    /// The ring's process was killed, and the kernel has not closed the ring yet.
    Orphan,
    /// Closed: the ring consumes no more requests and posts the CQEs of those in flight.
    Closing,
}

/// The guest's memory for one ring. The queues never wrap here; another test models the indexes.
#[derive(Clone, Copy, Hash)]
pub(crate) struct AreaMemory {
    pub(crate) sq: List<u8, 8>,
    /// A request, and whether it was executed (otherwise -ECANCELED).
    pub(crate) cq: List<(u8, bool), 8>,
}

impl AreaMemory {
    pub(crate) fn new() -> Self {
        Self { sq: List::new(), cq: List::new() }
    }
}

impl Ring {
    pub(crate) fn new(area: Area) -> Self {
        Self { area, life: Life::Live, sq_head: 0, in_flight: [false; REQUESTS] }
    }
}

impl System {
    pub(crate) fn kernel_steps(&self, step: &mut impl FnMut(Label, &dyn Fn(&mut Self) -> Broken)) {
        for (index, ring) in self.rings.iter().enumerate() {
            let next_sqe = self.areas[ring.area.index()].sq.get(ring.sq_head.into()).map(usize::from);
            if let (Life::Live | Life::Orphan, Some(request)) = (ring.life, next_sqe) {
                step(("the kernel consumes request", request), &|system| system.consume(index, request));
            }
            if ring.life == Life::Orphan {
                step(("the kernel closes orphan", index), &|system| {
                    system.rings.get_mut(index).life = Life::Closing;
                    Ok(())
                });
            }
            for request in (0..REQUESTS).filter(|request| ring.in_flight[*request]) {
                step(("the disk executes request", request), &|system| {
                    system.execute(request)?;
                    system.post(index, request, true);
                    Ok(())
                });
                if ring.life == Life::Closing {
                    step(("the kernel cancels request", request), &|system| {
                        system.post(index, request, false);
                        Ok(())
                    });
                }
            }
            if ring.life == Life::Closing && ring.in_flight == [false; REQUESTS] {
                step(("a ring is gone", index), &|system| {
                    system.rings.remove(index);
                    Ok(())
                });
            }
        }
    }

    fn consume(&mut self, index: usize, request: usize) -> Broken {
        if self.is_in_flight(request) {
            return Err(format!("request {request} was issued again before its older I/O ended"));
        }
        let ring = self.rings.get_mut(index);
        ring.sq_head += 1;
        ring.in_flight[request] = true;
        Ok(())
    }

    fn post(&mut self, index: usize, request: usize, executed: bool) {
        let ring = self.rings.get_mut(index);
        ring.in_flight[request] = false;
        let area = ring.area.index();
        self.areas[area].cq.push((request as u8, executed));
    }

    pub(crate) fn is_in_flight(&self, request: usize) -> bool {
        self.rings.iter().any(|ring| ring.in_flight[request])
    }

    pub(crate) fn execute(&mut self, request: usize) -> Broken {
        if std::mem::replace(&mut self.executed[request], true) {
            return Err(format!("request {request} was executed twice"));
        }
        Ok(())
    }
}
