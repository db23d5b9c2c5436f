//! Memory that the kernel still charges for closed rings.

use std::thread;
use std::time::{Duration, Instant};

/// How long to wait for such memory: the kernel frees it when the last I/O of a ring has ended, usually some
/// milliseconds after the ring is closed.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(5);

/// Calls `make` until it returns anything but a lack of memory, or the time is up.
///
/// Rings that this user's processes have just closed, those of a restarted server included, count against
/// `RLIMIT_MEMLOCK` until they have really ended.
pub(crate) fn while_memory_is_freed<T, E>(
    mut make: impl FnMut() -> Result<T, E>,
    lacks_memory: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let end = Instant::now() + PATIENCE;
    loop {
        match make() {
            Err(error) if lacks_memory(&error) && Instant::now() < end => thread::sleep(LOOK),
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_memory_is_retried_and_any_other_error_is_not() {
        let mut calls = 0;
        let made = while_memory_is_freed(
            || {
                calls += 1;
                if calls < 3 { Err("memory") } else { Ok(calls) }
            },
            |error| *error == "memory",
        );
        assert_eq!(made, Ok(3));
        let mut calls = 0;
        let made: Result<(), _> = while_memory_is_freed(
            || {
                calls += 1;
                Err("privilege")
            },
            |error| *error == "memory",
        );
        assert_eq!((made, calls), (Err("privilege"), 1));
    }
}
