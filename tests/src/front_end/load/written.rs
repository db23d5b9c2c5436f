//! The pages that the device wrote, as the driver knows them, to compare with the device's own log.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::front_end::shared::LOG_PAGE_BYTES;

/// Pages that the device wrote for requests that were both submitted and completed in one period.
#[derive(Debug, Default)]
pub struct WrittenPages(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    period: u64,
    is_open: bool,
    pages: BTreeSet<u64>,
    next_used: u16,
}

/// A period, as a request remembers it.
pub type Period = u64;

impl WrittenPages {
    /// Begins a period.
    pub fn begin(&self) {
        let mut state = self.lock();
        state.period += 1;
        state.is_open = true;
        state.pages.clear();
    }

    /// Ends the period, and returns its pages.
    pub fn end(&self) -> BTreeSet<u64> {
        let mut state = self.lock();
        state.is_open = false;
        std::mem::take(&mut state.pages)
    }

    /// The period that is open.
    pub fn period(&self) -> Option<Period> {
        let state = self.lock();
        state.is_open.then_some(state.period)
    }

    /// The device wrote these bytes for a request that was submitted in `period`.
    pub fn note(&self, period: Period, gpa: u64, len_bytes: u64) {
        let mut state = self.lock();
        if state.is_open && state.period == period {
            let pages = gpa / LOG_PAGE_BYTES..=(gpa + len_bytes - 1) / LOG_PAGE_BYTES;
            state.pages.extend(pages);
        }
    }

    /// The driver has taken everything up to this used index.
    pub fn set_next_used(&self, next_used: u16) {
        self.lock().next_used = next_used;
    }

    /// The used index up to which the driver has taken everything.
    pub fn next_used(&self) -> u16 {
        self.lock().next_used
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
