//! Memory that the kernel still charges for rings that are closed.

use std::thread;
use std::time::{Duration, Instant};

/// How long such memory is waited for: the kernel gives it back when the last I/O of a ring has ended, some milliseconds after
/// its close as a rule.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(5);

/// Calls `make` until it gives something else than a lack of memory, or the time is up.
///
/// Rings that this user's processes have just closed, a server that was restarted among them, are charged to `RLIMIT_MEMLOCK`
/// until they have really ended.
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
    fn only_a_lack_of_memory_is_waited_for() {
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
