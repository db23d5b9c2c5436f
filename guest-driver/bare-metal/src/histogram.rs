//! Latencies in fixed memory, with a bounded relative error.

/// Buckets per power of two, as a power of two: the resolution is one part in 256.
const PRECISION_BITS: u32 = 8;
/// The highest distinguished latency, as a power of two in nanoseconds: 34 s.
const RANGE_BITS: u32 = 35;

/// Number of buckets of a [`Histogram`].
pub const BUCKETS: usize = ((RANGE_BITS - PRECISION_BITS + 1) << PRECISION_BITS) as usize;

/// Log-linear counts of latencies: exact below 256 ns, then 256 buckets per power of two.
#[derive(Clone, Copy, Debug)]
pub struct Histogram;

impl Histogram {
    /// The bucket of `latency_ns`.
    pub fn bucket(latency_ns: u64) -> usize {
        let latency_ns = latency_ns.min((1 << RANGE_BITS) - 1);
        let Some(shift) = latency_ns.checked_ilog2().and_then(|log| log.checked_sub(PRECISION_BITS)) else {
            return latency_ns as usize;
        };
        ((u64::from(shift) << PRECISION_BITS) + (latency_ns >> shift)) as usize
    }

    /// The middle of a bucket, in nanoseconds.
    pub fn latency_ns(bucket: usize) -> u64 {
        let bucket = bucket.min(BUCKETS - 1) as u64;
        let Some(shift) = (bucket >> PRECISION_BITS).checked_sub(1) else { return bucket };
        let first = ((bucket & ((1 << PRECISION_BITS) - 1)) | 1 << PRECISION_BITS) << shift;
        first + (1u64 << shift) / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_is_accurate_to_one_part_in_512() {
        let mut latency_ns = 0u64;
        while latency_ns < 1 << RANGE_BITS {
            let found = Histogram::latency_ns(Histogram::bucket(latency_ns));
            assert!(found.abs_diff(latency_ns) <= latency_ns / 512, "{latency_ns} ns became {found} ns");
            latency_ns += 1 + latency_ns / 1000;
        }
    }

    #[test]
    fn buckets_ascend_without_gaps_up_to_the_last() {
        let ends = (0..BUCKETS).map(Histogram::latency_ns);
        assert!(ends.clone().zip(ends.skip(1)).all(|(earlier, later)| earlier < later));
        assert_eq!(
            (0..BUCKETS).map(|bucket| Histogram::bucket(Histogram::latency_ns(bucket))).max(),
            Some(BUCKETS - 1)
        );
        for bucket in 0..BUCKETS {
            assert_eq!(Histogram::bucket(Histogram::latency_ns(bucket)), bucket);
        }
    }

    #[test]
    fn a_latency_beyond_the_range_counts_as_the_maximum() {
        assert_eq!(Histogram::bucket(u64::MAX), BUCKETS - 1);
    }
}
