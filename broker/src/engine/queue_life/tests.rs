use std::cell::Cell;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;
use crate::engine::reply::Pending;

/// A queue of which the test says what is under way.
#[derive(Clone, Debug)]
struct TestQueue {
    id: u16,
    busy: Rc<Cell<bool>>,
    replay: Rc<Cell<bool>>,
    is_held: bool,
    is_attached: bool,
    /// How many queues there are now.
    _alive: Rc<()>,
    /// A queue was dropped while it was busy: its requests would end into memory that the worker has let go.
    is_dropped_busy: Rc<Cell<bool>>,
}

impl Drop for TestQueue {
    fn drop(&mut self) {
        if self.busy.get() {
            self.is_dropped_busy.set(true);
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct TestStart {
    id: u16,
    has_record: bool,
}

impl LiveQueue for TestQueue {
    fn is_busy(&self) -> bool {
        self.busy.get()
    }

    fn has_replay(&self) -> bool {
        self.replay.get()
    }

    fn is_held(&self) -> bool {
        self.is_held
    }

    fn is_executed_by_worker(&self) -> bool {
        !self.is_attached
    }

    fn next_avail(&self) -> u16 {
        self.id
    }

    fn into_idle(self) -> Idle {
        Idle { next_avail: self.id, eventfds: Eventfds::default() }
    }
}

impl PendingStart for TestStart {
    fn has_inflight_record(&self) -> bool {
        self.has_record
    }

    fn next_avail(&self) -> u16 {
        self.id
    }

    fn into_idle(self) -> Idle {
        Idle { next_avail: self.id, eventfds: Eventfds::default() }
    }
}

type TestLife = Life<TestQueue, TestStart>;

fn queue(busy: bool, replay: bool, is_held: bool) -> TestQueue {
    let cell = |value| Rc::new(Cell::new(value));
    TestQueue {
        id: 7,
        busy: cell(busy),
        replay: cell(replay),
        is_held,
        is_attached: false,
        _alive: Rc::new(()),
        is_dropped_busy: Rc::default(),
    }
}

fn start(has_record: bool) -> TestStart {
    TestStart { id: 3, has_record }
}

fn reply() -> Reply<u16> {
    Pending::new().0
}

fn next_name(next: &QueuedStart<TestStart>) -> &'static str {
    if next.stop.is_some() { "Waiting to replay and stop" } else { "Waiting" }
}

fn name(life: &TestLife) -> String {
    match life {
        Life::Stopped => "Stopped".into(),
        Life::Waiting(next) => next_name(next).into(),
        Life::Running(_) => "Running".into(),
        Life::Broken(Broken::WithQueue(_)) => "Broken, with its queue".into(),
        Life::Broken(Broken::Idle(_)) => "Broken".into(),
        Life::Stopping { is_replaying: true, .. } => "Stopping, replaying".into(),
        Life::Stopping { is_replaying: false, .. } => "Stopping".into(),
        Life::Draining { next: None, .. } => "Draining".into(),
        Life::Draining { next: Some(next), .. } => format!("Draining, then {}", next_name(next)),
    }
}

/// The queue and the start that a line of the table is about.
#[derive(Clone, Copy)]
struct Situation {
    busy: bool,
    replay: bool,
    held: bool,
    has_record: bool,
}

/// All states, made anew for each event.
fn states(situation: Situation) -> Vec<TestLife> {
    let Situation { busy, replay, held, has_record } = situation;
    let queue = || queue(busy, replay, held);
    let queued = |stop: bool| QueuedStart { start: start(has_record), stop: stop.then(reply) };
    vec![
        Life::Stopped,
        Life::Waiting(queued(false)),
        Life::Waiting(queued(true)),
        Life::Running(queue()),
        Life::Broken(Broken::WithQueue(queue())),
        Life::Broken(Broken::Idle(Idle::default())),
        Life::Stopping { queue: queue(), is_replaying: true, reply: reply() },
        Life::Stopping { queue: queue(), is_replaying: false, reply: reply() },
        Life::Draining { queue: queue(), next: None },
        Life::Draining { queue: queue(), next: Some(queued(false)) },
        Life::Draining { queue: queue(), next: Some(queued(true)) },
    ]
}

fn has_start(life: &TestLife) -> bool {
    matches!(life, Life::Waiting(_) | Life::Draining { next: Some(_), .. })
}

fn is_stop_asked(life: &TestLife) -> bool {
    matches!(
        life,
        Life::Waiting(QueuedStart { stop: Some(_), .. })
            | Life::Draining { next: Some(QueuedStart { stop: Some(_), .. }), .. }
    )
}

/// Each event with what the table says of its circumstances, for a state; of circumstances that make no difference there is one line.
fn events(number: usize) -> Vec<(&'static str, Situation, LifeEvent<TestQueue, TestStart>)> {
    let calm = Situation { busy: false, replay: false, held: false, has_record: true };
    let life = &states(calm)[number];
    let mut events = vec![("start", calm, LifeEvent::Start(start(false)))];
    match life {
        life if is_stop_asked(life) => events.push(("stop, in-flight record", calm, LifeEvent::Stop(reply()))),
        life if has_start(life) => {
            let without = Situation { has_record: false, ..calm };
            events.push(("stop, no in-flight record", without, LifeEvent::Stop(reply())));
            events.push(("stop, in-flight record", calm, LifeEvent::Stop(reply())));
        }
        _ => events.push(("stop", calm, LifeEvent::Stop(reply()))),
    }
    if matches!(life, Life::Running(_)) {
        events.push(("stop, held", Situation { held: true, ..calm }, LifeEvent::Stop(reply())));
    }
    events.push(("abandon", calm, LifeEvent::Abandon));
    events.push(("break", calm, LifeEvent::Break));
    events.push(("set up", calm, LifeEvent::SetUp(queue(false, false, false))));
    let settled = if matches!(life, Life::Stopping { is_replaying: true, .. }) {
        "settle, no replay, not busy"
    } else {
        "settle, not busy"
    };
    events.push((settled, calm, LifeEvent::Settle));
    events
}

fn table() -> String {
    let mut table = String::from("//! | state | event | effects | next state |\n//! | --- | --- | --- | --- |\n");
    let count = states(Situation { busy: false, replay: false, held: false, has_record: true }).len();
    for number in 0..count {
        for (event_name, situation, event) in events(number) {
            let before = states(situation).swap_remove(number);
            let before_name = name(&before);
            let is_replacement = matches!(event, LifeEvent::Start(_) | LifeEvent::Stop(_) | LifeEvent::Abandon);
            let (after, effects) = before.step(event);
            let after_name = name(&after);
            let said: Vec<_> = [(effects.is_broken, "broken"), (effects.answer.is_some(), "answer")]
                .into_iter()
                .filter_map(|(is_so, what)| is_so.then_some(what))
                .collect();
            // A start, a stop and an end of the front-end replace something also where the state keeps its name.
            let is_nothing = before_name == after_name && said.is_empty() && !is_replacement;
            if is_nothing || before_name == "Stopped" && after_name == "Stopped" {
                continue;
            }
            let said = if said.is_empty() { "-".into() } else { said.join(", ") };
            table += &format!("//! | {before_name} | {event_name} | {said} | {after_name} |\n");
        }
    }
    table
}

#[test]
fn the_table_in_the_documentation_is_what_the_machine_does() {
    let source = include_str!("../queue_life.rs");
    let (_, rest) = source.split_once("<!-- table -->\n").unwrap();
    let (documented, _) = rest.split_once("//! <!-- end of table -->").unwrap();
    assert_eq!(documented, table(), "correct the table, or the machine");
}

#[test]
fn a_queue_that_is_busy_or_has_chains_to_replay_does_not_settle() {
    for (busy, replay) in [(true, false), (true, true), (false, true)] {
        let situation = Situation { busy, replay, held: false, has_record: true };
        for (number, life) in states(situation).into_iter().enumerate() {
            let before = name(&life);
            let waits_for_replay = before == "Stopping, replaying";
            let (after, effects) = life.step(LifeEvent::Settle);
            if busy || waits_for_replay {
                assert_eq!(name(&after), before, "state {number}, busy {busy}, replay {replay}");
                assert!(effects.answer.is_none());
            }
        }
    }
}

/// What the search does next.
#[derive(Clone, Copy, Debug)]
enum Step {
    Start { has_record: bool },
    Stop,
    Abandon,
    Break,
    DiskComes { has_replay: bool, is_held: bool },
    BecomesBusy,
    BecomesQuiet,
    Replays,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        any::<bool>().prop_map(|has_record| Step::Start { has_record }),
        Just(Step::Stop),
        Just(Step::Abandon),
        Just(Step::Break),
        (any::<bool>(), any::<bool>()).prop_map(|(has_replay, is_held)| Step::DiskComes { has_replay, is_held }),
        Just(Step::BecomesBusy),
        Just(Step::BecomesQuiet),
        Just(Step::Replays),
    ];
    proptest::collection::vec(step, 0..40)
}

/// A queue with its front-end, which sends what it likes.
struct Bench {
    life: TestLife,
    next_id: u16,
    busy: Rc<Cell<bool>>,
    replay: Rc<Cell<bool>>,
    /// One clone for each queue that exists.
    alive: Rc<()>,
    is_dropped_busy: Rc<Cell<bool>>,
    /// The stop that may still be answered.
    pending: Option<Pending<u16>>,
    /// The start that counts, if the front-end has one.
    started: Option<u16>,
}

impl Bench {
    fn new() -> Self {
        Self {
            life: Life::Stopped,
            next_id: 0,
            busy: Rc::default(),
            replay: Rc::default(),
            alive: Rc::new(()),
            is_dropped_busy: Rc::default(),
            pending: None,
            started: None,
        }
    }

    fn step(&mut self, event: LifeEvent<TestQueue, TestStart>) -> bool {
        let (life, effects) = std::mem::replace(&mut self.life, Life::Stopped).step(event);
        self.life = life;
        let Effects { answer, is_broken } = effects;
        if let Some((reply, next_avail)) = answer {
            reply.send(next_avail).unwrap();
            let pending = self.pending.take().expect("a stop was answered for which the front-end does not wait");
            assert_eq!(pending.wait(), Some(next_avail), "another stop was answered");
            assert_eq!(Some(next_avail), self.started.take(), "the index of another start");
        }
        is_broken
    }

    /// The queue under way belongs to a front-end or to a start that counts no more.
    fn is_draining(&self) -> bool {
        matches!(self.life, Life::Draining { .. })
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Start { has_record } => {
                self.next_id += 1;
                (self.started, self.pending) = (Some(self.next_id), None);
                self.step(LifeEvent::Start(TestStart { id: self.next_id, has_record }));
            }
            Step::Stop => {
                let (reply, pending) = Pending::new();
                let is_stopped = matches!(self.life, Life::Stopped);
                let is_abandoned = matches!(self.life, Life::Draining { next: None, .. });
                if is_abandoned && self.started.is_none() {
                    // The answer is the index of the queue that drains; the front-end did not start it.
                    self.started = self.life.queue_mut().map(|queue| queue.id);
                }
                self.pending = Some(pending);
                self.step(LifeEvent::Stop(reply));
                if is_stopped {
                    let pending = self.pending.take().unwrap();
                    assert_eq!(pending.wait(), None, "the handle knows the index");
                    self.started = None;
                }
            }
            Step::Abandon => {
                (self.started, self.pending) = (None, None);
                self.step(LifeEvent::Abandon);
            }
            Step::Break => {
                let took = self.life.taking_or_replaying_mut(true).is_some();
                let is_held = self.life.queue_mut().is_some_and(|queue| queue.is_held);
                let is_waiting = matches!(self.life, Life::Waiting(_));
                let is_running = matches!(self.life, Life::Running(_));
                let is_broken = self.step(LifeEvent::Break);
                assert_eq!(is_broken, took || is_waiting || is_running && is_held);
                assert!(self.life.taking_or_replaying_mut(true).is_none(), "the worker still takes chains");
            }
            Step::DiskComes { has_replay, is_held } => {
                let Life::Waiting(next) = &self.life else { return };
                let id = next.start.id;
                assert_eq!(Rc::strong_count(&self.alive), 1, "a queue is set up beside an older one");
                self.busy.set(false);
                self.replay.set(has_replay && next.start.has_record);
                let (busy, replay, alive) = (self.busy.clone(), self.replay.clone(), self.alive.clone());
                let is_dropped_busy = self.is_dropped_busy.clone();
                let queue = TestQueue { id, busy, replay, is_held, is_attached: false, _alive: alive, is_dropped_busy };
                self.step(LifeEvent::SetUp(queue));
            }
            Step::BecomesBusy => {
                if self.life.taking_or_replaying_mut(true).is_some() {
                    self.busy.set(true);
                }
            }
            Step::BecomesQuiet => self.busy.set(false),
            Step::Replays => {
                if self.life.taking_or_replaying_mut(true).is_some() {
                    self.replay.set(false);
                }
            }
        }
        let _ = self.step(LifeEvent::Settle);
    }
}

proptest! {
    /// However a front-end starts, stops and leaves: each stop gets one answer, with the index of the start that it belongs to; no
    /// queue is set up while an older one exists; and once nothing is under way, a stop is answered and the queue holds no memory.
    #[test]
    fn each_stop_is_answered_once_and_no_queue_begins_beside_an_older_one(sequence in steps()) {
        let mut bench = Bench::new();
        for step in sequence {
            bench.take(step);
            prop_assert!(Rc::strong_count(&bench.alive) <= 2);
            prop_assert!(!bench.is_dropped_busy.get(), "a queue was dropped while it was busy, at {step:?}");
            prop_assert!(bench.life.taking_mut(false).is_none(), "a disabled queue is taken from");
            if bench.is_draining() {
                prop_assert!(bench.life.present_mut().is_none() && bench.life.taking_mut(true).is_none());
            }
        }
        bench.take(Step::BecomesQuiet);
        bench.take(Step::Stop);
        for _ in 0..2 {
            bench.take(Step::DiskComes { has_replay: true, is_held: false });
            bench.take(Step::Replays);
            bench.take(Step::BecomesQuiet);
        }
        prop_assert!(bench.pending.is_none(), "the stop has no answer in {:?}", name(&bench.life));
        prop_assert!(matches!(bench.life, Life::Stopped));
        prop_assert_eq!(Rc::strong_count(&bench.alive), 1, "a queue was kept");
    }
}
