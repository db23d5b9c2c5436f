//! A short list that is cheap to copy and to hash.

use std::hash::{Hash, Hasher};

#[derive(Clone, Copy)]
pub(crate) struct List<T, const N: usize> {
    items: [Option<T>; N],
    length: u8,
}

impl<T: Hash, const N: usize> Hash for List<T, N> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.length.hash(state);
        self.items.iter().flatten().for_each(|item| item.hash(state));
    }
}

impl<T: Copy, const N: usize> List<T, N> {
    pub(crate) fn new() -> Self {
        Self { items: [None; N], length: 0 }
    }

    pub(crate) fn push(&mut self, item: T) {
        self.items[usize::from(self.length)] = Some(item);
        self.length += 1;
    }

    pub(crate) fn remove(&mut self, index: usize) -> T {
        let item = self.items[index].take().expect("an item of the list");
        self.items[index..self.length.into()].rotate_left(1);
        self.length -= 1;
        item
    }

    pub(crate) fn len(&self) -> usize {
        self.length.into()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub(crate) fn get(&self, index: usize) -> Option<T> {
        self.items.get(index).copied().flatten()
    }

    pub(crate) fn get_mut(&mut self, index: usize) -> &mut T {
        self.items[index].as_mut().expect("an item of the list")
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = T> {
        self.items.into_iter().flatten()
    }
}
