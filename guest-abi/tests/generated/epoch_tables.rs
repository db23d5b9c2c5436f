//! The tables of states and events in `docs/abi.md`, generated from the machines.

use std::fmt::Write;

use ringpass_guest_abi::epoch::{Announcement, Area, Epoch, Phase, device, driver};
use ringpass_guest_abi::request::ErrorCode;

use crate::{compare, in_repository};

/// The epoch that stands for `e` in the tables.
const E: Epoch = Epoch::new(8);

fn announcement(phase: Phase) -> Announcement {
    Announcement { epoch: E, phase }
}

fn of_next(phase: Phase) -> Announcement {
    Announcement { epoch: E.next(), phase }
}

fn epoch_name(epoch: Epoch) -> &'static str {
    match epoch {
        epoch if epoch == E => "e",
        epoch if epoch == E.next() => "e+1",
        epoch if epoch == E.previous() => "e-1",
        epoch if epoch == Epoch::NONE.next() => "1",
        _ => panic!("epoch {epoch} has no name in the tables"),
    }
}

fn announcement_name(announcement: Announcement) -> String {
    format!("({}, {:?})", epoch_name(announcement.epoch), announcement.phase)
}

/// An event with its name in the table.
type Named<T> = (String, T);

fn device_row(machine: device::Machine) -> String {
    use device::State::*;
    let areas = |state: &str| format!("{state}, areas {:?}/{:?}", machine.area(Area::Even), machine.area(Area::Odd));
    match machine.state() {
        Detached => "Detached".into(),
        Waiting { found: None } => "Waiting, nothing announced".into(),
        Waiting { found: Some(found) } => format!("Waiting, found {}", announcement_name(found)),
        Opening { epoch } => areas(&format!("Opening {}", epoch_name(epoch))),
        Open { epoch } => format!("Open {}", epoch_name(epoch)),
        Draining { epoch } => format!("Draining {}", epoch_name(epoch)),
        Ending { epoch } => format!("Ending {}", epoch_name(epoch)),
        Ended { epoch } => format!("Ended {}", epoch_name(epoch)),
        Finishing { code } => format!("Finishing ({code:?})"),
        Stopping => "Stopping".into(),
    }
}

fn device_action(action: device::Action) -> String {
    use device::Action::*;
    match action {
        AwaitRelease => "await release".into(),
        Announce(announcement) => format!("announce {}", announcement_name(announcement)),
        Build(epoch) => format!("build {}", epoch_name(epoch)),
        Close(area) => format!("close {}", area_name(area)),
        CompleteAttach(code) => format!("complete ATTACH ({code:?})"),
        Stopped => "stopped".into(),
    }
}

fn area_name(area: Area) -> &'static str {
    if area == E.area() { "area of e" } else { "other area" }
}

fn device_events() -> Vec<Named<device::Event>> {
    use device::Event::*;
    let word =
        |announcement: Announcement| (format!("driver's word {}", announcement_name(announcement)), announcement);
    let words = [announcement(Phase::Drain), announcement(Phase::Ended)].map(|announcement| {
        let (name, announcement) = word(announcement);
        (name, Acknowledged(announcement.to_word()))
    });
    let mut events = vec![
        ("ATTACH, word 0".into(), Attach { found: 0, detach: false }),
        ("ATTACH, word of e".into(), Attach { found: announcement(Phase::Open).to_word(), detach: false }),
        ("ATTACH, detach set".into(), Attach { found: 0, detach: true }),
        ("released".into(), Released),
        ("built".into(), Built),
        ("build failed".into(), BuildFailed(ErrorCode::Resources)),
        ("gone: area of e".into(), Gone(E.area())),
        ("gone: other area".into(), Gone(E.next().area())),
    ];
    events.extend(words);
    events.extend([
        ("drain".into(), Drain),
        ("end".into(), End),
        ("finish".into(), Finish(ErrorCode::Mode)),
        ("stop".into(), Stop),
    ]);
    events
}

/// Each state in which a device can be, reached by a history of events.
fn device_states() -> Vec<device::Machine> {
    use device::Event::*;
    let attach = Attach { found: Announcement { epoch: E.previous(), phase: Phase::Ended }.to_word(), detach: false };
    let acknowledge = |epoch, phase| Acknowledged(Announcement { epoch, phase }.to_word());
    let open = [attach, Released, acknowledge(E.previous(), Phase::Ended), Built];
    let after = |more: &[device::Event]| [&open[..], more].concat();
    let drained = acknowledge(E, Phase::Drain);
    let histories: Vec<Vec<device::Event>> = vec![
        vec![],
        vec![Attach { found: 0, detach: false }],
        vec![Attach { found: announcement(Phase::Open).to_word(), detach: false }],
        after(&[]),
        after(&[Drain]),
        after(&[Drain, drained]),
        after(&[End]),
        after(&[End, Gone(E.area())]),
        after(&[Finish(ErrorCode::Mode)]),
        after(&[Stop]),
    ];
    let run = |history: Vec<device::Event>| {
        let mut machine = device::Machine::new();
        for event in history {
            machine.step(event);
        }
        machine
    };
    histories.into_iter().map(run).collect()
}

fn driver_row(machine: driver::Machine) -> String {
    use driver::State::*;
    match machine.state() {
        Idle { epoch: Epoch::NONE } => "Idle, nothing announced".into(),
        Idle { epoch } => format!("Idle {}", epoch_name(epoch)),
        Running { epoch } => format!("Running {}", epoch_name(epoch)),
        Draining { epoch } => format!("Draining {}", epoch_name(epoch)),
        Reaping { epoch } => format!("Reaping {}", epoch_name(epoch)),
        state => format!("{state:?}"),
    }
}

fn driver_action(action: driver::Action) -> String {
    use driver::Action::*;
    match action {
        Start(epoch) => format!("start {}", epoch_name(epoch)),
        Drain => "drain".into(),
        Reap(area) => format!("reap {}", area_name(area)),
        Acknowledge(announcement) => format!("acknowledge {}", announcement_name(announcement)),
        RequestDetach => "set detach, ring the doorbell".into(),
        Release => "release".into(),
        Reset => "reset".into(),
    }
}

const PHASES: [Phase; 3] = [Phase::Open, Phase::Drain, Phase::Ended];

fn driver_events() -> Vec<Named<driver::Event>> {
    driver_events_with(PHASES.map(announcement).into_iter().chain(PHASES.map(of_next)))
}

/// The events of a driver to which the device has announced nothing.
fn first_driver_events() -> Vec<Named<driver::Event>> {
    driver_events_with(PHASES.map(|phase| Announcement { epoch: Epoch::NONE.next(), phase }))
}

fn driver_events_with(words: impl IntoIterator<Item = Announcement>) -> Vec<Named<driver::Event>> {
    use driver::Event::*;
    let mut events: Vec<_> = words
        .into_iter()
        .map(|announcement| {
            (format!("device's word {}", announcement_name(announcement)), Announced(announcement.to_word()))
        })
        .collect();
    events.extend([
        ("device's word 0".into(), Announced(0)),
        ("drained".into(), Drained),
        ("reaped".into(), Reaped),
        ("ATTACH completed".into(), AttachCompleted),
        ("wants its queue back".into(), Detach),
    ]);
    events
}

fn driver_states() -> Vec<driver::Machine> {
    use driver::Event::*;
    let mut idle = driver::Machine::new();
    for number in 1..E.number() {
        let ended = Announcement { epoch: Epoch::new(number), phase: Phase::Ended };
        idle.step(Announced(ended.to_word()));
    }
    let hear = |phase| Announced(announcement(phase).to_word());
    let open = [hear(Phase::Open)];
    let histories: Vec<Vec<driver::Event>> = vec![
        vec![hear(Phase::Drain)],
        open.to_vec(),
        vec![open[0], hear(Phase::Drain)],
        vec![open[0], hear(Phase::Ended)],
        vec![open[0], AttachCompleted],
        vec![AttachCompleted],
        vec![Announced(0)],
    ];
    let run = |history: Vec<driver::Event>| {
        let mut machine = idle;
        for event in history {
            machine.step(event);
        }
        machine
    };
    histories.into_iter().map(run).collect()
}

/// One line for each event that does something.
fn line(table: &mut String, state: &str, event: &str, actions: Vec<String>, next: &str) {
    if state == next && actions.is_empty() {
        return;
    }
    let actions = if actions.is_empty() { "-".to_owned() } else { actions.join("; ") };
    writeln!(table, "| {state} | {event} | {actions} | {next} |").expect("a string takes everything");
}

const HEAD: &str = "| state | event | actions | next state |\n| --- | --- | --- | --- |\n";

fn device_table() -> String {
    let mut table = HEAD.to_owned();
    for machine in device_states() {
        for (name, event) in device_events() {
            let mut next = machine;
            let actions = next.step(event).into_iter().map(device_action).collect();
            line(&mut table, &device_row(machine), &name, actions, &device_row(next));
        }
    }
    table
}

fn driver_table() -> String {
    let mut table = HEAD.to_owned();
    let states = driver_states().into_iter().map(|machine| (machine, driver_events()));
    for (machine, events) in std::iter::once((driver::Machine::new(), first_driver_events())).chain(states) {
        for (name, event) in events {
            let mut next = machine;
            let actions = next.step(event).into_iter().map(driver_action).collect();
            line(&mut table, &driver_row(machine), &name, actions, &driver_row(next));
        }
    }
    table
}

/// The document with the text between two marks replaced.
fn replace(document: &str, mark: &str, table: &str) -> String {
    let (begin, end) = (format!("<!-- {mark} -->\n"), format!("<!-- end of {mark} -->"));
    let (before, rest) = document.split_once(&begin).unwrap_or_else(|| panic!("docs/abi.md has no {begin}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("docs/abi.md has no {end}"));
    format!("{before}{begin}{table}{end}{after}")
}

#[test]
fn the_tables_in_the_specification_match_the_machines() {
    let path = in_repository("docs/abi.md");
    let document = std::fs::read_to_string(&path).expect("docs/abi.md");
    let document = replace(&document, "device table", &device_table());
    compare(&path, &replace(&document, "driver table", &driver_table()));
}
