//! Breadth-first search over every interleaving, and the search for states without a way to the goal.

use std::collections::{HashMap, VecDeque};
use std::hash::{Hash, Hasher};

/// The label of a step: its name, and a number to distinguish steps of the same name.
pub(crate) type Label = (&'static str, usize);

/// A possible step.
pub(crate) struct Step<S> {
    pub(crate) label: Label,
    /// Whether the step is a fault, or a request of operators or users. Progress must not need such steps.
    pub(crate) is_fault: bool,
    /// The state after the step, or the rule that the step broke.
    pub(crate) result: Result<S, String>,
}

/// A system of several parties.
pub(crate) trait Model: Clone + Hash {
    fn steps(&self, steps: &mut Vec<Step<Self>>);
    /// Whether the parties have finished all their work.
    fn is_goal(&self) -> bool;
}

/// The statistics of a search without an error.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    pub(crate) states: usize,
    pub(crate) transitions: usize,
    pub(crate) goals: usize,
}

/// Visits every state that is reachable from `first`. The error is the broken rule with the steps that lead there;
/// because of the breadth-first order it has as few steps as possible.
pub(crate) fn explore<M: Model>(first: M) -> Result<Report, String> {
    let mut search = Search::default();
    let mut frontier = VecDeque::new();
    search.add(&first, (0, ("start", 0)));
    frontier.push_back(first);
    let mut steps = Vec::new();
    let mut transitions = 0;
    for id in 0.. {
        let Some(state) = frontier.pop_front() else { break };
        state.steps(&mut steps);
        for step in steps.drain(..) {
            transitions += 1;
            let next = step.result.map_err(|broken| search.story(id, step.label, &broken))?;
            let (next_id, is_new) = search.add(&next, (id, step.label));
            if !step.is_fault {
                search.edges.push((next_id, id));
            }
            if is_new {
                frontier.push_back(next);
            }
        }
    }
    search.check_progress()?;
    let goals = search.is_goal.iter().filter(|is_goal| **is_goal).count();
    Ok(Report { states: search.is_goal.len(), transitions, goals })
}

/// A 128-bit fingerprint of a state.
#[derive(Default)]
struct Fingerprint(u128);

impl Fingerprint {
    fn of(state: &impl Hash) -> u128 {
        let mut hasher = Self(0x6a09_e667_f3bc_c908_bb67_ae85_84ca_a73b);
        state.hash(&mut hasher);
        hasher.mix(0);
        hasher.0
    }

    fn mix(&mut self, value: u64) {
        // Multiply by an odd factor with bits in both halves, then fold the high half, which depends on all bits, into
        // the low.
        let product = (self.0 ^ u128::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        self.0 = product ^ product >> 67;
    }
}

impl Hasher for Fingerprint {
    fn finish(&self) -> u64 {
        self.0 as u64
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.mix(value.into());
    }

    fn write_u32(&mut self, value: u32) {
        self.mix(value.into());
    }

    fn write_isize(&mut self, value: isize) {
        self.mix(value as u64);
    }
}

#[derive(Default)]
struct Search {
    ids: HashMap<u128, u32>,
    /// The predecessor of each state.
    parents: Vec<(u32, Label)>,
    is_goal: Vec<bool>,
    /// The steps that are not faults, backwards.
    edges: Vec<(u32, u32)>,
}

impl Search {
    fn add<M: Model>(&mut self, state: &M, parent: (u32, Label)) -> (u32, bool) {
        let new_id = self.parents.len() as u32;
        let id = *self.ids.entry(Fingerprint::of(state)).or_insert(new_id);
        if id == new_id {
            self.parents.push(parent);
            self.is_goal.push(state.is_goal());
        }
        (id, id == new_id)
    }

    /// From every state a goal must be reachable without any further fault.
    fn check_progress(&mut self) -> Result<(), String> {
        self.edges.sort_unstable();
        let mut can_end = self.is_goal.clone();
        let mut work: Vec<u32> = (0..).zip(&can_end).filter(|(_, is_goal)| **is_goal).map(|(id, _)| id).collect();
        while let Some(id) = work.pop() {
            let start = self.edges.partition_point(|(to, _)| *to < id);
            for (_, from) in self.edges[start..].iter().take_while(|(to, _)| *to == id) {
                if !std::mem::replace(&mut can_end[*from as usize], true) {
                    work.push(*from);
                }
            }
        }
        match (0..).zip(&can_end).find(|(_, can_end)| !**can_end) {
            None => Ok(()),
            Some((id, _)) => {
                let (parent, label) = self.parents[id as usize];
                Err(self.story(parent, label, "nothing leads from here to the end"))
            }
        }
    }

    fn story(&self, mut id: u32, last: Label, broken: &str) -> String {
        let mut labels = vec![last];
        while id != 0 {
            let (parent, label) = self.parents[id as usize];
            labels.push(label);
            id = parent;
        }
        let steps: Vec<String> = labels.iter().rev().map(|(name, index)| format!("  {name} {index}")).collect();
        format!("{broken}, after\n{}", steps.join("\n"))
    }
}
