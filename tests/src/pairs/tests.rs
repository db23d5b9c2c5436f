use std::collections::{HashMap, HashSet};

use proptest::{collection::vec, prelude::*};

use super::*;

const VALUES: [usize; 6] = [0, 1, 2, 3, 4, 5];

/// A random space: the number of values of each factor, and clashes between values of three factors.
/// (A clash whose factors repeat is one between two.)
#[derive(Debug, Clone)]
struct Shape {
    sizes: Vec<usize>,
    clashes: Vec<[(usize, usize); 3]>,
}

fn shapes() -> impl Strategy<Value = Shape> {
    vec(1..=5usize, 1..=5).prop_flat_map(|sizes| {
        let factor = 0..sizes.len();
        let term = (factor, 0..5usize);
        (Just(sizes), vec([term.clone(), term.clone(), term], 0..12))
            .prop_map(|(sizes, clashes)| Shape { sizes, clashes })
    })
}

impl Shape {
    fn space(&self) -> Space<'static> {
        let mut space = Space::new();
        let factors: Vec<Factor<'static, usize>> =
            self.sizes.iter().map(|&size| space.factor("f", &VALUES[..size])).collect();
        for &[(a, av), (b, bv), (c, cv)] in self.clashes.iter().filter(|clash| Self::names_two_factors(clash)) {
            space.forbid3(factors[a], factors[b], factors[c], move |&a, &b, &c| a == av && b == bv && c == cv);
        }
        space
    }

    fn names_two_factors(clash: &[(usize, usize); 3]) -> bool {
        clash.iter().any(|term| term.0 != clash[0].0)
    }

    /// The allowed rows, found without the code under test: count through all of them.
    fn allowed_rows(&self) -> HashSet<Vec<usize>> {
        let mut rows = vec![vec![]];
        for &size in &self.sizes {
            rows = rows
                .iter()
                .flat_map(|row| (0..size).map(move |value| row.iter().copied().chain([value]).collect::<Vec<_>>()))
                .collect();
        }
        let clashes: Vec<_> = self.clashes.iter().filter(|clash| Self::names_two_factors(clash)).collect();
        rows.retain(|row| !clashes.iter().any(|clash| clash.iter().all(|&(factor, value)| row[factor] == value)));
        rows.into_iter().collect()
    }
}

fn values_in<'r>(rows: impl IntoIterator<Item = &'r Vec<usize>>) -> HashSet<(usize, usize)> {
    rows.into_iter().flat_map(|row| row.iter().copied().enumerate()).collect()
}

fn pairs_in<'r>(rows: impl IntoIterator<Item = &'r Vec<usize>>) -> HashSet<[(usize, usize); 2]> {
    rows.into_iter()
        .flat_map(|row| (0..row.len()).flat_map(move |b| (0..b).map(move |a| [(a, row[a]), (b, row[b])])))
        .collect()
}

proptest! {
    #[test]
    fn the_rows_are_allowed_and_have_every_value_and_every_allowed_pair(shape in shapes(), seed: u64) {
        let allowed = shape.allowed_rows();
        let value_count: usize = shape.sizes.iter().sum();
        let result = shape.space().all_pairs(Seed::fixed(seed));
        if values_in(&allowed).len() < value_count {
            prop_assert!(result.is_err(), "a value without a row was accepted");
            return Ok(());
        }
        let rows: Vec<Vec<usize>> = result.expect("every value has a row").into_iter().map(|row| row.choice).collect();
        prop_assert!(rows.iter().all(|row| allowed.contains(row)));
        prop_assert_eq!(values_in(&rows).len(), value_count);
        prop_assert_eq!(pairs_in(&rows), pairs_in(&allowed));
        prop_assert_eq!(rows.iter().collect::<HashSet<_>>().len(), rows.len(), "a row appears twice");
    }

    #[test]
    fn the_full_product_is_every_allowed_row_once(shape in shapes()) {
        let allowed = shape.allowed_rows();
        if let Ok(rows) = shape.space().full_product() {
            prop_assert_eq!(rows.len(), allowed.len());
            prop_assert_eq!(rows.into_iter().map(|row| row.choice).collect::<HashSet<_>>(), allowed);
        } else {
            prop_assert!(values_in(&allowed).len() < shape.sizes.iter().sum());
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_rows(shape in shapes(), seed: u64) {
        let rows = || shape.space().all_pairs(Seed::fixed(seed)).ok();
        prop_assert_eq!(rows(), rows());
    }
}

#[test]
fn ten_factors_of_four_values_take_few_rows() {
    let mut space = Space::new();
    for _ in 0..10 {
        space.factor("f", &VALUES[..4]);
    }
    let rows = space.all_pairs(Seed::fixed(0)).expect("a space without rules");
    // 16 pairs of two factors need 16 rows; this search takes 29 or 30, one that picks values at random 36 to 38,
    // and the full product has 1 048 576.
    assert!((16..=32).contains(&rows.len()), "{} rows", rows.len());
}

#[test]
fn a_row_gives_its_values_by_type_and_displays_them() {
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    enum Disk {
        File,
        Loop,
    }
    let mut space = Space::new();
    let depth = space.factor("depth", &[1_u32, 256]);
    let disk = space.factor("disk", &[Disk::File, Disk::Loop]);
    let name = space.factor("name", &["x", "y"]);
    space.forbid2(depth, disk, |&depth, &disk| depth == 256 && disk == Disk::Loop);
    let mut seen = HashMap::new();
    for row in space.full_product().expect("every value is possible") {
        let text = format!("depth={}, disk={:?}, name={:?}", depth.of(&row), disk.of(&row), name.of(&row));
        assert_eq!(row.to_string(), text);
        *seen.entry((*depth.of(&row), *disk.of(&row))).or_insert(0) += 1;
    }
    assert_eq!(seen, HashMap::from([((1, Disk::File), 2), ((1, Disk::Loop), 2), ((256, Disk::File), 2)]));
}

#[test]
fn a_value_that_no_row_may_have_is_refused_by_name() {
    let mut space = Space::new();
    let depth = space.factor("depth", &[1, 256]);
    let entries = space.factor("ring entries", &[8, 64]);
    space.forbid2(depth, entries, |depth, entries| depth > entries);
    let refusal = space.all_pairs(Seed::fixed(0)).expect_err("256 fits no ring").to_string();
    assert_eq!(refusal, "depth=256 is in no allowed row: leave the value out, or correct the rules");
    assert_eq!(space.full_product().expect_err("256 fits no ring").to_string(), refusal);
}

#[test]
fn a_factor_without_values_is_refused_by_name() {
    let mut space = Space::new();
    space.factor("depth", &[1, 2]);
    space.factor::<u32>("disk", &[]);
    assert_eq!(space.all_pairs(Seed::fixed(0)).expect_err("no disk").to_string(), "the factor `disk` has no values");
    assert_eq!(
        Space::new().full_product().expect_err("no factor").to_string(),
        "a test matrix without factors has no rows"
    );
}
