use std::collections::HashSet;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::request::ErrorCode;

/// Every machine that any history of events can lead to, with the numbers of epochs cut at 6.
fn device_machines() -> Vec<device::Machine> {
    let words = (0..24).chain([u32::MAX]);
    let attaches = [0, 5, 6, 7, 20]
        .into_iter()
        .flat_map(|found| [false, true].map(|detach| device::Event::Attach { found, detach }));
    let events: Vec<_> = attaches
        .chain(words.map(device::Event::Acknowledged))
        .chain(Area::ALL.map(device::Event::Gone))
        .chain([device::Event::Released, device::Event::Built, device::Event::BuildFailed(ErrorCode::Resources)])
        .chain([device::Event::Drain, device::Event::End, device::Event::Stop])
        .chain([device::Event::Finish(ErrorCode::Detached)])
        .collect();
    let mut seen = HashSet::from([device::Machine::new()]);
    let mut work = Vec::from_iter(seen.iter().copied());
    while let Some(machine) = work.pop() {
        for event in &events {
            let mut next = machine;
            let actions = next.step(*event);
            assert!(actions.into_iter().count() <= 4);
            if seen.insert(next) {
                work.push(next);
            }
        }
    }
    seen.into_iter().collect()
}

#[test]
fn every_step_has_room_for_its_actions() {
    assert!(device_machines().len() > 30);
}

#[test]
fn a_stop_always_ends_when_the_rings_are_gone() {
    for mut machine in device_machines() {
        let was_attached = machine.state() != device::State::Detached;
        let mut actions: Vec<_> = machine.step(device::Event::Stop).into_iter().collect();
        for _ in 0..2 {
            actions.extend(machine.step(device::Event::Built));
            Area::ALL.into_iter().for_each(|area| actions.extend(machine.step(device::Event::Gone(area))));
        }
        assert_eq!(machine.state(), device::State::Detached);
        assert_eq!(actions.contains(&device::Action::Stopped), was_attached);
        assert!(Area::ALL.into_iter().all(|area| machine.area(area) == device::AreaUse::Free));
    }
}

#[test]
fn epoch_numbers_wrap_around_and_alternate_between_the_areas() {
    let last = Epoch::new(u32::MAX);
    assert_eq!((last.number(), last.next().number(), last.next().previous()), ((1 << 30) - 1, 0, last));
    assert_ne!(last.area(), last.next().area());
}

#[test]
fn a_driver_waits_while_the_word_is_0_and_takes_no_word_without_a_phase_later() {
    let word = |number| Announcement { epoch: Epoch::new(number), phase: Phase::Ended }.to_word();
    let resets = |history: &[u32], word: u32| {
        let mut machine = driver::Machine::new();
        history
            .iter()
            .for_each(|&word| assert_eq!(machine.step(driver::Event::Announced(word)).into_iter().count(), 1));
        let actions: Vec<_> = machine.step(driver::Event::Announced(word)).into_iter().collect();
        (actions == [driver::Action::Reset], machine.state() == driver::State::Failed)
    };
    assert_eq!(resets(&[], 0), (false, false), "the device has announced nothing");
    assert_eq!(resets(&[word(1)], 0), (true, true), "the device has announced something");
    for word_without_phase in [1 << 2, 4 << 2, !3] {
        assert_eq!(resets(&[], word_without_phase), (true, true));
    }
}

proptest! {
    #[test]
    fn a_word_with_a_phase_is_encoded_back_unchanged(word: u32) {
        match Announcement::from_word(word) {
            Some(announcement) => prop_assert_eq!(announcement.to_word(), word),
            None => prop_assert_eq!(word & 3, 0),
        }
    }

    #[test]
    fn a_driver_survives_any_device(words in proptest::collection::vec(prop_oneof![0..20u32, any::<u32>()], 0..40)) {
        let mut machine = driver::Machine::new();
        for word in words {
            machine.step(driver::Event::Announced(word));
            machine.step(driver::Event::Drained);
            machine.step(driver::Event::Reaped);
        }
        machine.step(driver::Event::AttachCompleted);
        machine.step(driver::Event::Reaped);
        prop_assert_eq!(machine.state(), driver::State::Detached);
    }
}
