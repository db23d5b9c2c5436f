//! The two machines of the epoch protocol against each other, over every interleaving of their accesses to what they
//! share, with a kernel whose rings end late, devices that are killed at any step, requests of two SQEs, requests that
//! go over queue 0 meanwhile, drivers that reset a device without a process, and drivers that lie.
//!
//! The searches show that there are never two rings on one area, that the device never builds a ring where the driver
//! reads, that no request is issued again before its older I/O has ended, that no request is executed twice or lost,
//! that none ends while I/O on its buffer is under way, and that every state has a way to the end. For each rule of the
//! protocol a further search shows that it finds an error if one side violates the rule.
//!
//! Other tests cover memory orderings and the wrap of the ring's indexes (`tests/loom_orderings`, `src/ring/tests.rs`).

mod device;
mod driver;
mod explore;
mod kernel;
mod list;
mod model;

use explore::{Report, explore};
use model::{Budget, Cheat, Notice, System};

/// Searches, and prints the number of states.
fn holds(name: &str, system: System) -> Report {
    let report = explore(system).unwrap_or_else(|story| panic!("{story}"));
    println!("{name}: {} states, {} transitions, {} ends", report.states, report.transitions, report.goals);
    assert!(report.goals > 0);
    report
}

/// Searches, and expects to find a broken rule whose message contains `expected`.
fn breaks(system: System, expected: &str) {
    let story = explore(system).expect_err("the search should have found the broken rule");
    println!("{story}");
    assert!(story.contains(expected), "expected {expected:?}, found {story}");
}

const NOTHING: Budget =
    Budget { crashes: 0, stops: 0, drains: 0, ends: 0, refusals: 0, detaches: 0, resets: 0, lies: 0 };

#[test]
fn drains_lose_and_double_nothing() {
    holds("three drains", System::new(Budget { drains: 3, ..NOTHING }));
}

#[test]
fn ends_lose_and_double_nothing() {
    holds("two ends and a drain", System::new(Budget { ends: 2, drains: 1, ..NOTHING }));
}

#[test]
fn a_device_that_is_killed_at_any_step_loses_and_doubles_nothing() {
    holds("two kills and a drain", System::new(Budget { crashes: 2, drains: 1, ..NOTHING }));
    holds("a kill and an end", System::new(Budget { crashes: 1, ends: 1, ..NOTHING }));
}

#[test]
fn a_queue_that_stops_and_starts_loses_and_doubles_nothing() {
    holds("two stops and a drain", System::new(Budget { stops: 2, drains: 1, ..NOTHING }));
    holds("a stop and a kill", System::new(Budget { stops: 1, crashes: 1, ..NOTHING }));
}

#[test]
fn a_driver_gets_its_queue_back_whatever_happens_meanwhile() {
    holds("a detach, a kill, a drain", System::new(Budget { detaches: 1, crashes: 1, drains: 1, ..NOTHING }));
    holds("a detach, a stop, an end", System::new(Budget { detaches: 1, stops: 1, ends: 1, ..NOTHING }));
}

#[test]
fn a_device_that_gives_out_no_ring_any_more_loses_and_doubles_nothing() {
    holds("a refusal, a kill, a drain", System::new(Budget { refusals: 1, crashes: 1, drains: 1, ..NOTHING }));
    holds("a refusal, a stop", System::new(Budget { refusals: 1, stops: 1, ..NOTHING }));
}

#[test]
fn every_change_is_heard_of_by_event_alone() {
    holds("by EVENT", System::new(Budget { crashes: 1, drains: 1, ..NOTHING }).by(Notice::Event));
    holds("by EVENT, detach", System::new(Budget { detaches: 1, ends: 1, ..NOTHING }).by(Notice::Event));
    // The device may be killed between the completion of ATTACH and that of EVENT.
    holds("by EVENT, refusal", System::new(Budget { refusals: 1, crashes: 1, ..NOTHING }).by(Notice::Event));
}

#[test]
fn a_request_of_several_sqes_ends_and_is_repeated_only_as_a_whole() {
    let ends = Budget { ends: 2, crashes: 1, ..NOTHING };
    holds("two ends and a kill, one request", System::new(ends).of_one_request());
    let drains = Budget { drains: 2, crashes: 1, ..NOTHING };
    holds("two drains and a kill, one request", System::new(drains).of_one_request());
}

#[test]
fn a_driver_that_resets_a_device_without_a_process_loses_nothing_and_reuses_no_memory_too_early() {
    holds("two kills, a reset", System::new(Budget { crashes: 2, resets: 1, ..NOTHING }));
    holds("a kill, a reset, an end", System::new(Budget { crashes: 1, resets: 1, ends: 1, ..NOTHING }));
}

#[test]
fn no_lie_makes_two_rings_on_one_area_or_a_device_that_cannot_go_on() {
    let budget = Budget { lies: 2, crashes: 1, stops: 1, drains: 1, ends: 1, refusals: 1, ..NOTHING };
    holds("two lies", System::new(budget));
}

#[test]
fn reusing_an_area_before_its_ring_is_gone_is_found() {
    breaks(System::new(Budget { drains: 2, ..NOTHING }).with(Cheat::ReuseEarly), "two rings have the");
    breaks(System::new(Budget { detaches: 1, ..NOTHING }).with(Cheat::ReuseEarly), "ATTACH was completed before");
}

#[test]
fn announcing_the_end_before_the_lock_is_found() {
    let system = System::new(Budget { crashes: 1, ..NOTHING }).with(Cheat::EndBeforeLock);
    breaks(system, "issued again before its older I/O ended");
}

#[test]
fn opening_without_the_drivers_word_is_found() {
    // The third ring is then built in the area of the first, which a slow driver still reads.
    let system = System::new(Budget { ends: 2, ..NOTHING }).with(Cheat::OpenUnasked);
    breaks(system, "an honest device seemed faulty");
}

#[test]
fn taking_every_attach_for_the_first_one_is_found() {
    breaks(System::new(Budget { crashes: 1, ..NOTHING }).with(Cheat::AlwaysFirst), "while the driver reads it");
}

#[test]
fn not_looking_at_the_detach_word_is_found() {
    let system = System::new(Budget { detaches: 1, crashes: 1, ..NOTHING }).with(Cheat::ForgetDetach);
    breaks(system, "nothing leads from here to the end");
    let system = System::new(Budget { detaches: 1, ..NOTHING }).with(Cheat::ForgetDetachOnKick);
    breaks(system, "nothing leads from here to the end");
}

#[test]
fn a_base_behind_attach_is_found() {
    let system = System::new(Budget { stops: 1, ..NOTHING }).with(Cheat::BaseBehindAttach);
    breaks(system, "nothing leads from here to the end");
}

#[test]
fn missing_signals_are_found() {
    breaks(System::new(NOTHING).with(Cheat::NoSignal), "nothing leads from here to the end");
    breaks(System::new(Budget { drains: 1, ..NOTHING }).with(Cheat::NoKick), "nothing leads from here to the end");
    let detached = Budget { detaches: 1, crashes: 1, ..NOTHING };
    breaks(System::new(detached).with(Cheat::SilentStart), "nothing leads from here to the end");
    let by_event = System::new(Budget { drains: 1, ..NOTHING }).by(Notice::Event);
    breaks(by_event.with(Cheat::ForgetEvent), "nothing leads from here to the end");
    let by_event = System::new(Budget { refusals: 1, crashes: 1, ..NOTHING }).by(Notice::Event);
    breaks(by_event.with(Cheat::SilentStart), "nothing leads from here to the end");
}

#[test]
fn acknowledging_a_ring_that_is_not_drained_is_found() {
    let system = System::new(Budget { drains: 1, ..NOTHING }).with(Cheat::AcknowledgeUndrained);
    breaks(system, "issued again before its older I/O ended");
}

#[test]
fn not_reaping_a_ring_that_has_ended_is_found() {
    breaks(System::new(Budget { ends: 1, ..NOTHING }).with(Cheat::AcknowledgeUnreaped), "was executed twice");
}

#[test]
fn taking_a_canceled_request_for_done_is_found() {
    breaks(System::new(Budget { ends: 1, ..NOTHING }).with(Cheat::CanceledIsDone), "was lost");
}

#[test]
fn sending_a_request_again_while_one_of_its_sqes_is_on_the_ring_is_found() {
    let system = System::new(Budget { ends: 1, ..NOTHING }).of_one_request().with(Cheat::ResendEarly);
    breaks(system, "issued again before its older I/O ended");
}

#[test]
fn ending_a_request_whose_other_sqe_is_under_way_is_found() {
    let system = System::new(NOTHING).of_one_request().with(Cheat::EndEarly);
    breaks(system, "ended while I/O on its buffer was under way");
}

#[test]
fn reusing_memory_after_a_reset_without_an_answer_is_found() {
    let system = System::new(Budget { crashes: 1, resets: 1, ..NOTHING }).with(Cheat::NoQuarantine);
    breaks(system, "used again while the ring was left");
}
