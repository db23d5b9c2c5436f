//! Block contents, generated from a seed and identified by a checksum.

use xxhash_rust::xxh3::xxh3_64;

/// The bit in the expected table that marks a block of a request in flight. Checksums never have this bit.
pub(crate) const IN_FLIGHT: u64 = 1 << 63;

/// The entry of a block with unknown content.
pub(crate) const UNKNOWN: u64 = 0;

/// An odd constant with evenly spread bits (2^64 divided by the golden ratio).
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

const SECTOR_BYTES: usize = 512;

/// The entry of the expected table for a block with this content: 63 bits of its XXH3, never 0.
pub fn checksum(content: &[u8]) -> u64 {
    (xxh3_64(content) & !IN_FLIGHT).max(1)
}

/// The splitmix64 generator: small, fast, and good enough to choose blocks.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    /// A number below `bound`, without a division.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        scale(self.next(), bound)
    }

    /// True with a probability of `percent` percent.
    pub(crate) fn chance(&mut self, percent: u32) -> bool {
        self.below(100) < percent
    }
}

/// The upper half of `random` as a fraction of `bound`.
fn scale(random: u64, bound: u32) -> u32 {
    (((random >> 32) * u64::from(bound)) >> 32) as u32
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Fills `buffer` with the content of write number `operation` to `block`, whose expectation was `previous`. Because
/// the expectation is part of the key, a write never repeats the content of the block, even if a job runs twice.
///
/// The words are an arithmetic sequence from a random start. Compilers vectorise this, so filling costs less than the
/// checksum, and the value of each word depends on its position.
pub(crate) fn fill(buffer: &mut [u8], seed: u64, block: u64, operation: u64, previous: u64) {
    let mut word = mix(mix(mix(seed ^ previous.rotate_left(17)).wrapping_add(block)).wrapping_add(operation));
    for chunk in buffer.chunks_exact_mut(size_of::<u64>()) {
        chunk.copy_from_slice(&word.to_ne_bytes());
        word = word.wrapping_add(STEP);
    }
}

/// Changes the start of every sector of `buffer`, so that a sector that a read does not transfer cannot still have the
/// right content from an earlier request.
pub(crate) fn spoil(buffer: &mut [u8]) {
    for sector in buffer.chunks_exact_mut(SECTOR_BYTES) {
        if let Some(first) = sector.first_chunk_mut::<8>() {
            *first = (!u64::from_ne_bytes(*first)).to_ne_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_differ_with_every_part_of_the_key() {
        let content = |seed, block, operation, previous| {
            let mut buffer = [0; 4096];
            fill(&mut buffer, seed, block, operation, previous);
            checksum(&buffer)
        };
        let base = content(1, 2, 3, 4);
        assert_eq!(base, content(1, 2, 3, 4));
        for other in [content(2, 2, 3, 4), content(1, 3, 3, 4), content(1, 2, 4, 4), content(1, 2, 3, 5)] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn a_spoiled_sector_never_keeps_its_checksum() {
        let mut buffer = [0; 2048];
        fill(&mut buffer, 1, 1, 1, 0);
        let before = buffer;
        spoil(&mut buffer);
        for (sector, old) in buffer.chunks(SECTOR_BYTES).zip(before.chunks(SECTOR_BYTES)) {
            assert_ne!(checksum(sector), checksum(old));
        }
    }

    #[test]
    fn random_numbers_stay_below_their_bound_and_reach_all_of_it() {
        let mut random = Random::new(7);
        let mut seen = [false; 10];
        for _ in 0..1000 {
            seen[random.below(10) as usize] = true;
        }
        assert_eq!(seen, [true; 10]);
        assert!((0..100).all(|_| random.chance(100)));
        assert!(!(0..100).any(|_| random.chance(0)));
    }
}
