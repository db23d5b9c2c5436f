//! The fuzzer's function as a property test, and the seeds of the fuzzer.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::*;
use crate::fuzzing::save_seed;

/// Enough bytes for a region of some entries and some dozens of steps.
const CHOICES_MAX: usize = 300;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn every_region_is_recovered_like_the_model(bytes in vec(any::<u8>(), 0..CHOICES_MAX)) {
        inflight_region(&bytes);
    }
}

#[test]
fn the_arbitrary_regions_reach_every_outcome() {
    let mut runner = TestRunner::deterministic();
    let strategy = vec(any::<u8>(), 0..CHOICES_MAX);
    let mut outcomes = BTreeMap::<Outcome, u32>::new();
    for _ in 0..4_000 {
        let bytes = strategy.new_tree(&mut runner).expect("nothing is filtered").current();
        let outcome = run(&bytes);
        if !outcomes.contains_key(&outcome) {
            save_seed("inflight_region", &format!("outcome-{}", outcomes.len()), &bytes);
        }
        *outcomes.entry(outcome).or_default() += 1;
    }
    eprintln!("{outcomes:#?}");
    let reached = |is: fn(&Outcome) -> bool| outcomes.keys().any(is);
    assert!(reached(|outcome| outcome.refused && !outcome.restarted));
    assert!(reached(|outcome| outcome.replayed && outcome.repaired && outcome.completed));
    assert!(reached(|outcome| outcome.restarted && outcome.completed && !outcome.stopped));
    assert!(reached(|outcome| outcome.stopped));
    assert!(reached(|outcome| *outcome == Outcome::default()));
}

/// An input that a fuzzer found: rings that begin at 0 over a region that matches none of their states.
#[test]
fn the_model_also_restarts_rings_that_begin_at_0() {
    const FOUND: &[u8] = &[
        0, 0, 0, 0, 0, 0, 0, 190, 107, 145, 168, 235, 151, 104, 167, 33, 217, 119, 184, 255, 255, 255, 255, 255, 255,
        255, 13, 180, 103, 39, 35, 35, 35, 35, 35, 35, 35, 35, 35, 172, 18, 4, 237, 237, 77, 135, 134, 131, 210, 182,
        182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 35, 35, 35, 35, 35, 35, 35, 35, 35,
        35, 35, 60, 116, 91, 111, 22, 201, 156, 107, 145, 168, 235, 151, 104, 167, 33, 217, 119, 184, 180, 103, 35, 35,
        35, 3, 0, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 2, 0, 0, 0, 182, 182, 182, 182, 182, 182, 182,
        182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 0, 0, 0, 0, 0, 182,
        182, 182, 182, 182, 0, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182,
        182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 182, 78, 164, 180, 141,
    ];
    run(FOUND);
}
