//! Recovery from the in-flight region of an earlier process, when a queue starts.

use super::error::QueueError;
use super::inflight::{InflightQueue, VERSION};

/// Where a queue goes on.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Recovered {
    /// Index of the next entry of the available ring to take.
    pub(super) next_avail: u16,
    /// Heads of the chains that were taken and not returned, in the order of taking.
    pub(super) replay: Vec<u16>,
    /// The counter of the next chain.
    pub(super) next_counter: u64,
    /// `last_batch_head` of the region.
    pub(super) last_batch_head: u16,
}

/// Repairs a queue's region and reads from it where the queue goes on.
///
/// `used_idx` is the index of the used ring, `next_avail` the value from the front-end. This function prepares an
/// unused region and trusts the front-end. Otherwise it trusts the region, because a front-end whose back-end was
/// killed can only guess the index.
pub(super) fn recover(
    region: &InflightQueue,
    size: u16,
    used_idx: u16,
    next_avail: u16,
) -> Result<Recovered, QueueError> {
    if region.entries() < size {
        return Err(QueueError::InflightTooSmall { entries: region.entries(), size });
    }
    match region.version() {
        0 => {
            begin(region, used_idx);
            return Ok(Recovered { next_avail, replay: Vec::new(), next_counter: 0, last_batch_head: 0 });
        }
        VERSION => {}
        version => return Err(QueueError::InflightVersion { version }),
    }
    let last_batch_head = match finish_last_batch(region, size, used_idx) {
        Ok(head) => head,
        // The rings were set up again and the front-end kept the region. Either the region records nothing, or a chain
        // in it belongs to a previous driver, which never got it back: rings that begin at 0 have used nothing yet.
        Err(_) if (used_idx, next_avail) == (0, 0) || (0..size).all(|head| !region.is_in_flight(head)) => {
            region.begin_again();
            return recover(region, size, used_idx, next_avail);
        }
        Err(error) => return Err(error),
    };
    let mut in_flight: Vec<(u64, u16)> =
        (0..size).filter(|&head| region.is_in_flight(head)).map(|head| (region.counter(head), head)).collect();
    in_flight.sort_unstable();
    let next_counter = in_flight.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
    let replay: Vec<u16> = in_flight.into_iter().map(|(_, head)| head).collect();
    // At most `size`, which is at most 32768.
    let next_avail = used_idx.wrapping_add(replay.len() as u16);
    Ok(Recovered { next_avail, replay, next_counter, last_batch_head })
}

/// Prepares an unused region. `version` comes last: without it the next process repeats all of this.
fn begin(region: &InflightQueue, used_idx: u16) {
    for head in 0..region.entries() {
        region.set_in_flight(head, false);
    }
    region.set_desc_num(region.entries());
    region.set_last_batch_head(0);
    region.set_used_idx(used_idx);
    region.set_version(VERSION);
}

/// Completes in the region what the used ring already has. Returns `last_batch_head`.
///
/// Chains are returned in batches, linked through `next`.
fn finish_last_batch(region: &InflightQueue, size: u16, used_idx: u16) -> Result<u16, QueueError> {
    let region_used_idx = region.used_idx();
    let last_batch_head = region.last_batch_head();
    let batch = used_idx.wrapping_sub(region_used_idx);
    if batch == 0 {
        return Ok(last_batch_head);
    }
    let unlike = || QueueError::InflightUsedIndex { ring_used_idx: used_idx, region_used_idx, size };
    if batch > size {
        return Err(unlike());
    }
    // Reads all heads first, so that a list that leads nowhere changes nothing.
    let mut heads = Vec::with_capacity(usize::from(batch));
    let mut head = last_batch_head;
    for _ in 0..batch {
        if head >= size {
            return Err(unlike());
        }
        heads.push(head);
        head = region.next(head);
    }
    for head in heads {
        region.set_in_flight(head, false);
    }
    region.set_used_idx(used_idx);
    Ok(last_batch_head)
}
