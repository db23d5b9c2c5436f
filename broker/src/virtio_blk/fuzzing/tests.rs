//! The reference model against the parser, with chains of all kinds.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::*;
use crate::fuzzing::save_seed;

/// Enough bytes for all choices of a chain.
const CHOICES_MAX: usize = 100;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn every_chain_is_parsed_like_the_reference_model(bytes in vec(any::<u8>(), 0..CHOICES_MAX)) {
        parse_chain(&bytes);
    }
}

/// The name of the variant without its values.
fn outcome(parsed: &Parsed) -> String {
    let words = |text: String| text.split([' ', '(', ')', '{']).next().unwrap_or_default().to_owned();
    match parsed {
        Parsed::Request(request) => words(format!("{:?}", request.operation)),
        Parsed::Answer(answer) => answer.refusal.map_or("NothingToDo".into(), |refusal| words(format!("{refusal:?}"))),
        Parsed::AttachRequest(request) => words(format!("{:?}", request.request_type)),
        Parsed::Malformed(error) => {
            let debug = format!("{error:?}");
            words(debug.trim_start_matches("Chain(").to_owned())
        }
    }
}

#[test]
fn the_arbitrary_chains_reach_every_outcome() {
    let mut runner = TestRunner::deterministic();
    let strategy = vec(any::<u8>(), CHOICES_MAX);
    let mut outcomes = BTreeMap::<String, u32>::new();
    for _ in 0..40_000 {
        let bytes = strategy.new_tree(&mut runner).expect("nothing is filtered").current();
        let outcome = outcome(&parse_and_check(&bytes));
        if !outcomes.contains_key(&outcome) {
            save_seed("virtio_blk_request", &outcome, &bytes);
        }
        *outcomes.entry(outcome).or_default() += 1;
    }
    eprintln!("{outcomes:#?}");
    let expected = [
        "Arm",
        "Attach",
        "BeyondCapacity",
        "DataLength",
        "Discard",
        "Event",
        "Flags",
        "Flush",
        "GetId",
        "IndexOutOfRange",
        "IndirectInIndirect",
        "IndirectLength",
        "IndirectWithNext",
        "Loop",
        "NoStatus",
        "NotNegotiated",
        "NothingToDo",
        "OutsideMemory",
        "Probe",
        "RangeTooLong",
        "Read",
        "ReadOnly",
        "ReadableAfterWritable",
        "ShortHeader",
        "StatusOutsideMemory",
        "TooManyBytes",
        "TooManyRanges",
        "TooManySegments",
        "Unaligned",
        "UnknownType",
        "Write",
        "WriteZeroes",
        "WrongDirection",
    ];
    assert_eq!(outcomes.keys().map(String::as_str).collect::<Vec<_>>(), expected);
}
