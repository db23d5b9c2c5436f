//! For tests: an event between any two stores to shared memory. A process dies, or a visitor looks at the memory.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// The number of stores before the event, and the event.
type Visit = (u64, Box<dyn FnOnce()>);

thread_local! {
    /// How many more stores the thread makes; `None`: all.
    static STORES_LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    /// The event between two future stores.
    static VISIT: RefCell<Option<Visit>> = const { RefCell::new(None) };
    /// How many stores the thread has made in total.
    static STORES_MADE: Cell<u64> = const { Cell::new(0) };
}

/// The panic payload of the first store that the process does not make any more.
struct Death;

/// Called before each store to memory that outlives the process.
pub(super) fn before_store() {
    if let Some(left) = STORES_LEFT.get() {
        if left == 0 {
            // Not `panic!`: nothing is wrong, and nothing should be printed.
            resume_unwind(Box::new(Death));
        }
        STORES_LEFT.set(Some(left - 1));
    }
    let visit = VISIT.with_borrow_mut(|visit| match visit {
        Some((0, _)) => visit.take(),
        Some((left, _)) => {
            *left -= 1;
            None
        }
        None => None,
    });
    if let Some((_, visit)) = visit {
        visit();
    }
    STORES_MADE.set(STORES_MADE.get() + 1);
}

/// Calls `visit` after `stores` more stores, right before the next one.
pub(super) fn visit_after(stores: u64, visit: impl FnOnce() + 'static) {
    VISIT.set(Some((stores, Box::new(visit))));
}

/// Whether the visit has happened. If it has not, it will not happen any more.
pub(super) fn was_visited() -> bool {
    VISIT.take().is_none()
}

/// Runs `life`, which dies after `stores` stores. `None`: it died.
pub(super) fn live_for<T>(stores: u64, life: impl FnOnce() -> T) -> Option<T> {
    STORES_LEFT.set(Some(stores));
    // The tests examine what `life` leaves half-done in shared memory; nothing else of it is used again.
    let result = catch_unwind(AssertUnwindSafe(life));
    STORES_LEFT.set(None);
    match result {
        Ok(value) => Some(value),
        Err(cause) if cause.is::<Death>() => None,
        Err(cause) => resume_unwind(cause),
    }
}

/// How many stores this thread has made.
pub(super) fn stores_made() -> u64 {
    STORES_MADE.get()
}
