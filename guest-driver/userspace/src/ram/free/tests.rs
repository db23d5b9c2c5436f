//! The free list against a model that knows the state of each page.

use proptest::prelude::*;

use super::super::PAGE_BYTES;
use super::*;

const MIB: u64 = 1 << 20;
/// No area that fits in between crosses a multiple of this.
const BOUNDARY: u64 = SEGMENT_BOUNDARY_BYTES;
/// Two regions that touch, one of them across a boundary, and one behind a hole.
const REGIONS: [(u64, u64); 3] = [(BOUNDARY - 2 * MIB, MIB), (BOUNDARY - MIB, 2 * MIB), (BOUNDARY + 4 * MIB, MIB / 2)];

/// The model: the pages of each region, and which are free.
struct Pages(Vec<(u64, Vec<bool>)>);

impl Pages {
    fn new() -> Self {
        Self(REGIONS.map(|(gpa, len_bytes)| (gpa, vec![true; (len_bytes / PAGE_BYTES) as usize])).into())
    }

    /// The lowest place for an area.
    fn first(&self, len_bytes: u64, align_bytes: u64) -> Option<u64> {
        let count = (len_bytes / PAGE_BYTES) as usize;
        self.0.iter().find_map(|(gpa, free)| {
            let starts = (0..free.len()).map(|page| (page, gpa + page as u64 * PAGE_BYTES));
            let fits = |&(page, gpa): &(usize, u64)| {
                let is_whole = gpa / BOUNDARY == (gpa + len_bytes - 1) / BOUNDARY;
                gpa % align_bytes == 0
                    && is_whole
                    && free[page..].len() >= count
                    && free[page..page + count].iter().all(|&is| is)
            };
            starts.filter(fits).map(|(_, gpa)| gpa).next()
        })
    }

    fn is_free(&self, gpa: u64, len_bytes: u64) -> bool {
        let count = (len_bytes / PAGE_BYTES) as usize;
        self.0.iter().any(|(start, free)| {
            gpa.checked_sub(*start).is_some_and(|offset_bytes| {
                let page = (offset_bytes / PAGE_BYTES) as usize;
                page + count <= free.len() && free[page..page + count].iter().all(|&is| is)
            })
        })
    }

    /// Changes the state of an area that lies in one region, all of which was in the other state.
    fn set(&mut self, gpa: u64, len_bytes: u64, is_free: bool) {
        let place = self.0.iter_mut().rev().find(|(start, _)| *start <= gpa).expect("a region");
        let page = ((gpa - place.0) / PAGE_BYTES) as usize;
        for state in &mut place.1[page..page + (len_bytes / PAGE_BYTES) as usize] {
            assert_ne!(*state, is_free, "the area at {gpa:#x} was {} before", if is_free { "free" } else { "taken" });
            *state = is_free;
        }
    }

    fn free_bytes(&self) -> u64 {
        self.0.iter().flat_map(|(_, free)| free).filter(|&&is_free| is_free).count() as u64 * PAGE_BYTES
    }

    fn longest_bytes(&self) -> u64 {
        let runs = self.0.iter().flat_map(|(_, free)| free.split(|&is_free| !is_free).map(<[bool]>::len));
        runs.max().unwrap_or(0) as u64 * PAGE_BYTES
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Allocate {
        pages: u64,
        align_pages_log2: u32,
    },
    Reserve {
        page: u64,
        pages: u64,
    },
    /// Returns one of the taken areas.
    Return {
        choice: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..90_u64, 0..7_u32)
            .prop_map(|(pages, align_pages_log2)| Step::Allocate { pages, align_pages_log2 }),
        1 => (0..2100_u64, 1..40_u64).prop_map(|(page, pages)| Step::Reserve { page, pages }),
        3 => any::<usize>().prop_map(|choice| Step::Return { choice }),
    ]
}

proptest! {
    #[test]
    fn areas_never_overlap_and_all_memory_comes_back(steps in prop::collection::vec(step(), 1..300)) {
        let mut free = FreeRam::new(REGIONS.into_iter());
        let mut model = Pages::new();
        let all_bytes = model.free_bytes();
        let mut taken = Vec::new();
        for step in steps {
            match step {
                Step::Allocate { pages, align_pages_log2 } => {
                    let (len_bytes, align_bytes) = (pages * PAGE_BYTES, PAGE_BYTES << align_pages_log2);
                    let found = free.take_first(len_bytes, align_bytes);
                    prop_assert_eq!(found, model.first(len_bytes, align_bytes));
                    if let Some(gpa) = found {
                        model.set(gpa, len_bytes, false);
                        taken.push((gpa, len_bytes));
                    }
                }
                Step::Reserve { page, pages } => {
                    let (gpa, len_bytes) = (BOUNDARY - 3 * MIB + page * PAGE_BYTES, pages * PAGE_BYTES);
                    let is_taken = free.take_at(gpa, len_bytes);
                    prop_assert_eq!(is_taken, model.is_free(gpa, len_bytes));
                    if is_taken {
                        model.set(gpa, len_bytes, false);
                        taken.push((gpa, len_bytes));
                    }
                }
                Step::Return { choice } => {
                    if !taken.is_empty() {
                        let (gpa, len_bytes) = taken.swap_remove(choice % taken.len());
                        free.give_back(gpa, len_bytes);
                        model.set(gpa, len_bytes, true);
                    }
                }
            }
            prop_assert_eq!(free.free_bytes(), model.free_bytes());
            prop_assert_eq!(free.longest_bytes(), model.longest_bytes());
        }
        for (gpa, len_bytes) in taken {
            free.give_back(gpa, len_bytes);
        }
        prop_assert_eq!(free.free_bytes(), all_bytes);
        // The free RAM is in as few pieces as at the beginning: an area can have a whole region again.
        prop_assert_eq!(free.ranges().count(), 3);
    }
}

#[test]
fn an_area_longer_than_the_boundary_begins_at_the_first_free_page() {
    let mut free = FreeRam::new([(BOUNDARY - MIB, 8 * MIB)].into_iter());
    assert_eq!(free.take_first(BOUNDARY + MIB, PAGE_BYTES), Some(BOUNDARY - MIB));
    assert_eq!(free.take_first(MIB, PAGE_BYTES), Some(2 * BOUNDARY));
}
