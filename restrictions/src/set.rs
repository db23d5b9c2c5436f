//! Sets of operations, as 256-bit maps.

use core::{fmt, marker::PhantomData};

use crate::operation::{Operation, RegisterOperation};

/// A set of SQE operations.
pub type OperationSet = CodeSet<Operation>;

/// A set of register operations.
pub type RegisterOperationSet = CodeSet<RegisterOperation>;

const WORD_BITS: u8 = 64;

/// A set of operations numbered 0 to 255; used as [`OperationSet`] and [`RegisterOperationSet`].
pub struct CodeSet<C> {
    words: [u64; 4],
    codes: PhantomData<C>,
}

impl<C: From<u8> + Into<u8> + Copy> CodeSet<C> {
    /// The set without any operation.
    #[must_use]
    pub const fn new() -> Self {
        Self { words: [0; 4], codes: PhantomData }
    }

    /// The set with this bit map, the lowest numbers first.
    pub(crate) const fn from_words(words: [u64; 4]) -> Self {
        Self { words, codes: PhantomData }
    }

    /// The operations with numbers below `end`, 0 to 256.
    pub(crate) const fn below(end: u16) -> Self {
        let mut words = [0; 4];
        let mut code = 0;
        while code < end && code <= u8::MAX as u16 {
            words[(code / 64) as usize] |= 1 << (code % 64);
            code += 1;
        }
        Self::from_words(words)
    }

    #[inline]
    fn position(operation: C) -> (usize, u64) {
        let code: u8 = operation.into();
        (usize::from(code / WORD_BITS), 1 << (code % WORD_BITS))
    }

    /// Adds an operation, if the set does not contain it.
    pub fn insert(&mut self, operation: C) {
        let (word, bit) = Self::position(operation);
        self.words[word] |= bit;
    }

    /// Removes an operation, if the set contains it.
    pub fn remove(&mut self, operation: C) {
        let (word, bit) = Self::position(operation);
        self.words[word] &= !bit;
    }

    /// Whether the operation is in the set.
    #[inline]
    #[must_use]
    pub fn contains(&self, operation: C) -> bool {
        let (word, bit) = Self::position(operation);
        self.words[word] & bit != 0
    }

    /// Whether there is no operation in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words == [0; 4]
    }

    /// The number of operations in the set, 0 to 256.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The operations, in ascending order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = C> + '_ {
        (0..=u8::MAX).map(C::from).filter(|&operation| self.contains(operation))
    }

    /// The operations that are in this set or in the other.
    #[must_use]
    pub fn union(mut self, other: &Self) -> Self {
        self.words.iter_mut().zip(other.words).for_each(|(word, other)| *word |= other);
        self
    }

    /// The operations that are in both sets.
    #[must_use]
    pub fn intersection(mut self, other: &Self) -> Self {
        self.words.iter_mut().zip(other.words).for_each(|(word, other)| *word &= other);
        self
    }

    /// The operations that are in this set and not in the other.
    #[must_use]
    pub fn difference(mut self, other: &Self) -> Self {
        self.words.iter_mut().zip(other.words).for_each(|(word, other)| *word &= !other);
        self
    }
}

// Written by hand: derived implementations would demand the same traits of the phantom operation type.
impl<C> Clone for CodeSet<C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<C> Copy for CodeSet<C> {}

impl<C> PartialEq for CodeSet<C> {
    fn eq(&self, other: &Self) -> bool {
        self.words == other.words
    }
}

impl<C> Eq for CodeSet<C> {}

impl<C: From<u8> + Into<u8> + Copy> Default for CodeSet<C> {
    fn default() -> Self {
        Self::new()
    }
}

impl<C: From<u8> + Into<u8> + Copy> FromIterator<C> for CodeSet<C> {
    fn from_iter<I: IntoIterator<Item = C>>(operations: I) -> Self {
        let mut set = Self::new();
        operations.into_iter().for_each(|operation| set.insert(operation));
        set
    }
}

impl<C: From<u8> + Into<u8> + Copy + fmt::Debug> fmt::Debug for CodeSet<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// The names, separated by commas; "nothing" for the empty set.
impl<C: From<u8> + Into<u8> + Copy + fmt::Display> fmt::Display for CodeSet<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing");
        }
        for (index, operation) in self.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{operation}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_set_of_numbers(a in prop::collection::btree_set(any::<u8>(), 0..40),
                                       b in prop::collection::btree_set(any::<u8>(), 0..40), taken in any::<u8>()) {
            let set = |codes: &BTreeSet<u8>| codes.iter().copied().map(Operation::new).collect::<OperationSet>();
            let codes = |set: OperationSet| set.iter().map(Operation::code).collect::<BTreeSet<u8>>();
            prop_assert_eq!(codes(set(&a)), a.clone());
            prop_assert_eq!(set(&a).len(), a.len());
            prop_assert_eq!(set(&a).is_empty(), a.is_empty());
            prop_assert_eq!(codes(set(&a).union(&set(&b))), &a | &b);
            prop_assert_eq!(codes(set(&a).intersection(&set(&b))), &a & &b);
            prop_assert_eq!(codes(set(&a).difference(&set(&b))), &a - &b);
            let mut without = set(&a);
            without.remove(Operation::new(taken));
            prop_assert!(!without.contains(Operation::new(taken)));
            prop_assert_eq!(without.len(), a.len() - usize::from(a.contains(&taken)));
        }
    }

    #[test]
    fn a_set_is_displayed_as_names() {
        let set: OperationSet = [Operation::WRITE_FIXED, Operation::READ_FIXED].into_iter().collect();
        assert_eq!(set.to_string(), "IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED");
        assert_eq!(OperationSet::new().to_string(), "nothing");
    }
}
