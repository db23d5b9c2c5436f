//! All-pairs test matrices: every value, and every allowed pair of values, in few rows.
//!
//! Most faults that depend on a combination depend on two values (D. R. Kuhn, D. R. Wallace, A. M. Gallo: "Software
//! Fault Interactions and Implications for Software Testing", IEEE TSE 30(6), 2004). A covering array of strength 2
//! tries every such combination at a small part of the full product's cost; the soak runs the full product.
//!
//! ```
//! use ringpass_tests::{pairs::Space, seed::Seed};
//!
//! let mut space = Space::new();
//! let depth = space.factor("depth", &[1, 32, 256]);
//! let entries = space.factor("ring entries", &[8, 64, 4096]);
//! let polling = space.factor("SQ polling", &[false, true]);
//! space.forbid2(depth, entries, |depth, entries| depth > entries);
//!
//! for row in space.all_pairs(Seed::fixed(1))? {
//!     assert!(depth.of(&row) <= entries.of(&row), "{row}");
//!     let _ = polling.of(&row);
//! }
//! # anyhow::Ok(())
//! ```

use std::{fmt, iter};

use anyhow::{Result, bail, ensure};

use crate::seed::Seed;

/// How many candidates the search grows for each row. More candidates give slightly fewer rows and take longer.
const CANDIDATES: usize = 24;

/// The combinations with which a test can run: factors with their values, and rules that forbid combinations.
#[derive(Default)]
pub struct Space<'v> {
    factors: Vec<Labels>,
    rules: Vec<Rule<'v>>,
}

struct Labels {
    name: &'static str,
    values: Vec<String>,
}

/// Whether the values chosen so far already break the rule. Further values cannot repair that.
type Rule<'v> = Box<dyn Fn(&[Option<usize>]) -> bool + 'v>;

/// One factor of a [`Space`]: reads its value out of a [`Row`].
#[derive(Debug)]
pub struct Factor<'v, T> {
    index: usize,
    values: &'v [T],
}

impl<T> Clone for Factor<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Factor<'_, T> {}

impl<'v, T> Factor<'v, T> {
    /// This factor's value in a row of its own space.
    pub fn of(self, row: &Row) -> &'v T {
        &self.values[row.choice[self.index]]
    }

    fn chosen(self, choice: &[Option<usize>]) -> Option<&'v T> {
        choice[self.index].map(|value| &self.values[value])
    }
}

/// One combination. Displays as `depth=32, SQ polling=true`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Row {
    choice: Vec<usize>,
    text: String,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl<'v> Space<'v> {
    /// A space without factors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a factor. Its values are those that this machine can test: leave out the others and say so.
    pub fn factor<T: fmt::Debug>(&mut self, name: &'static str, values: &'v [T]) -> Factor<'v, T> {
        let labels = values.iter().map(|value| format!("{value:?}")).collect();
        self.factors.push(Labels { name, values: labels });
        Factor { index: self.factors.len() - 1, values }
    }

    /// Forbids the rows in which these two values do not go together.
    pub fn forbid2<A, B>(&mut self, a: Factor<'v, A>, b: Factor<'v, B>, clash: impl Fn(&A, &B) -> bool + 'v) {
        self.rules.push(Box::new(move |choice| match (a.chosen(choice), b.chosen(choice)) {
            (Some(a), Some(b)) => clash(a, b),
            _ => false,
        }));
    }

    /// Forbids the rows in which these three values do not go together.
    pub fn forbid3<A, B, C>(
        &mut self,
        a: Factor<'v, A>,
        b: Factor<'v, B>,
        c: Factor<'v, C>,
        clash: impl Fn(&A, &B, &C) -> bool + 'v,
    ) {
        self.rules.push(Box::new(move |choice| match (a.chosen(choice), b.chosen(choice), c.chosen(choice)) {
            (Some(a), Some(b), Some(c)) => clash(a, b, c),
            _ => false,
        }));
    }

    /// Rows in which every value and every pair of values appears, as far as the rules allow the pair in any row.
    /// The same space and seed give the same rows.
    ///
    /// # Errors
    ///
    /// A factor has no values, or the rules leave a value no row at all: it would be in the matrix and never tested.
    pub fn all_pairs(&self, seed: Seed) -> Result<Vec<Row>> {
        self.check_every_value_is_possible()?;
        let mut rng = seed.rng();
        let mut missing = self.possible_pairs();
        let mut rows = Vec::new();
        if let [only] = self.factors.as_slice() {
            return Ok((0..only.values.len()).map(|value| self.row(vec![value])).collect());
        }
        while !missing.is_empty() {
            let (choice, _gain) = iter::repeat_with(|| self.grow_row(&missing, &mut rng))
                .take(CANDIDATES)
                .max_by_key(|(_, gain)| *gain)
                .expect("at least one candidate");
            missing.retain(|pair| !pair.is_in(&choice));
            rows.push(self.row(choice));
        }
        Ok(rows)
    }

    /// Every allowed row.
    ///
    /// # Errors
    ///
    /// As [`Space::all_pairs`].
    pub fn full_product(&self) -> Result<Vec<Row>> {
        self.check_every_value_is_possible()?;
        let mut rows = Vec::new();
        self.visit_rows(&mut vec![None; self.factors.len()], 0, &mut |choice| rows.push(self.row(choice)));
        Ok(rows)
    }

    fn check_every_value_is_possible(&self) -> Result<()> {
        ensure!(!self.factors.is_empty(), "a test matrix without factors has no rows");
        for factor in &self.factors {
            ensure!(!factor.values.is_empty(), "the factor `{}` has no values", factor.name);
        }
        for (index, factor) in self.factors.iter().enumerate() {
            for (value, label) in factor.values.iter().enumerate() {
                if !self.is_possible(&[(index, value)]) {
                    bail!("{}={label} is in no allowed row: leave the value out, or correct the rules", factor.name);
                }
            }
        }
        Ok(())
    }

    fn possible_pairs(&self) -> Vec<Pair> {
        let values = |factor: usize| (0..self.factors[factor].values.len()).map(move |value| (factor, value));
        let factors = 0..self.factors.len();
        factors
            .clone()
            .flat_map(|a| (a + 1..factors.end).map(move |b| (a, b)))
            .flat_map(|(a, b)| values(a).flat_map(move |a| values(b).map(move |b| Pair(a, b))))
            .filter(|pair| self.is_possible(&[pair.0, pair.1]))
            .collect()
    }

    fn is_possible(&self, chosen: &[(usize, usize)]) -> bool {
        let mut choice = vec![None; self.factors.len()];
        for &(factor, value) in chosen {
            choice[factor] = Some(value);
        }
        self.can_be_completed(&mut choice)
    }

    /// Backtracking search for an allowed row with the values chosen so far. Leaves `choice` as it was.
    fn can_be_completed(&self, choice: &mut [Option<usize>]) -> bool {
        if self.breaks_a_rule(choice) {
            return false;
        }
        let Some(open) = choice.iter().position(Option::is_none) else {
            return true;
        };
        let found = (0..self.factors[open].values.len()).any(|value| {
            choice[open] = Some(value);
            self.can_be_completed(choice)
        });
        choice[open] = None;
        found
    }

    fn breaks_a_rule(&self, choice: &[Option<usize>]) -> bool {
        self.rules.iter().any(|breaks| breaks(choice))
    }

    /// Grows an allowed row around a missing pair, one factor after the other, each with the value that brings most
    /// missing pairs; and counts the missing pairs in it.
    fn grow_row(&self, missing: &[Pair], rng: &mut fastrand::Rng) -> (Vec<usize>, usize) {
        let mut choice = vec![None; self.factors.len()];
        let Pair((a, a_value), (b, b_value)) = missing[rng.usize(..missing.len())];
        choice[a] = Some(a_value);
        choice[b] = Some(b_value);

        let mut open: Vec<usize> = (0..choice.len()).filter(|&factor| factor != a && factor != b).collect();
        rng.shuffle(&mut open);
        for factor in open {
            let mut values: Vec<usize> = (0..self.factors[factor].values.len()).collect();
            rng.shuffle(&mut values);
            let mut gains = vec![0; values.len()];
            for pair in missing {
                if let Some(value) = pair.value_of_open(factor, &choice) {
                    gains[value] += 1;
                }
            }
            values.sort_by_key(|&value| std::cmp::Reverse(gains[value]));
            let fits = |value: &usize| {
                choice[factor] = Some(*value);
                self.can_be_completed(&mut choice)
            };
            let taken = values.into_iter().find(fits);
            choice[factor] = taken;
        }
        let choice: Vec<usize> =
            choice.into_iter().map(|value| value.expect("each step left a row that can be completed")).collect();
        let gain = missing.iter().filter(|pair| pair.is_in(&choice)).count();
        (choice, gain)
    }

    fn visit_rows(&self, choice: &mut [Option<usize>], factor: usize, visit: &mut impl FnMut(Vec<usize>)) {
        if self.breaks_a_rule(choice) {
            return;
        }
        let Some(labels) = self.factors.get(factor) else {
            visit(choice.iter().map(|value| value.expect("all factors are chosen")).collect());
            return;
        };
        for value in 0..labels.values.len() {
            choice[factor] = Some(value);
            self.visit_rows(choice, factor + 1, visit);
        }
        choice[factor] = None;
    }

    fn row(&self, choice: Vec<usize>) -> Row {
        let text: Vec<String> = self
            .factors
            .iter()
            .zip(&choice)
            .map(|(factor, &value)| format!("{}={}", factor.name, factor.values[value]))
            .collect();
        Row { choice, text: text.join(", ") }
    }
}

/// Two values of two factors, each as (factor, value).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pair((usize, usize), (usize, usize));

impl Pair {
    fn is_in(self, choice: &[usize]) -> bool {
        choice[self.0.0] == self.0.1 && choice[self.1.0] == self.1.1
    }

    /// The value of `factor` that would complete this pair, if its other value is chosen.
    fn value_of_open(self, factor: usize, choice: &[Option<usize>]) -> Option<usize> {
        let (this, other) = if self.0.0 == factor { (self.0, self.1) } else { (self.1, self.0) };
        (this.0 == factor && choice[other.0] == Some(other.1)).then_some(this.1)
    }
}

#[cfg(test)]
mod tests;
