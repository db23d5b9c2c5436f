//! A bounded rate of log lines about connections.

use std::time::{Duration, Instant};

use tracing::info;

/// Lines that a window has at most: what a VMM that starts, reconnects and stops has to say, several times over.
const LINES_MAX: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);

/// Decides which events of connections are worth a line. A process that connects again and again must not fill a disk with logs.
#[derive(Debug, Default)]
pub(super) struct ConnectionLog {
    window_start: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl ConnectionLog {
    /// Whether there is room for one more line. If lines were left out before, one says how many.
    pub(super) fn has_room(&mut self) -> bool {
        let (has_room, left_out) = self.has_room_at(Instant::now());
        if left_out > 0 {
            info!(left_out, "lines about connections were left out, there were too many");
        }
        has_room
    }

    /// The same at a time, and how many lines the window before has left out.
    fn has_room_at(&mut self, now: Instant) -> (bool, u64) {
        let mut left_out = 0;
        if self.window_start.is_none_or(|start| now.duration_since(start) >= WINDOW) {
            left_out = self.left_out;
            *self = Self { window_start: Some(now), ..Self::default() };
        }
        let has_room = self.lines < LINES_MAX;
        if has_room {
            self.lines += 1;
        } else {
            self.left_out += 1;
        }
        (has_room, left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_so_many_lines_and_the_next_one_says_how_many_are_missing() {
        let mut log = ConnectionLog::default();
        let start = Instant::now();
        for _ in 0..LINES_MAX {
            assert_eq!(log.has_room_at(start), (true, 0));
        }
        let late = start + WINDOW - Duration::from_millis(1);
        assert_eq!([log.has_room_at(late), log.has_room_at(late)], [(false, 0); 2]);
        assert_eq!(log.has_room_at(start + WINDOW), (true, 2));
        assert_eq!(log.has_room_at(start + WINDOW), (true, 0));
    }
}
