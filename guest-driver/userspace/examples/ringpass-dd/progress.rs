//! The progress display.

use std::cell::Cell;
use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::Arguments;
use crate::transfer::Transfer;

/// A bar on standard error, if that is a terminal, and a line at the end.
pub(crate) struct Progress {
    bar: ProgressBar,
    begin: Instant,
    losses: Cell<u64>,
}

impl Progress {
    /// The progress of a copy of `len_bytes` bytes, if the length is known.
    pub(crate) fn new(arguments: &Arguments, what: &'static str, len_bytes: Option<u64>) -> Self {
        let is_shown = !arguments.no_progress && stderr().is_terminal();
        let target = if is_shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(len_bytes, target).with_message(what);
        let template = match len_bytes {
            Some(_) => "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
            None => "{msg} {spinner} {binary_bytes} {binary_bytes_per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, begin: Instant::now(), losses: Cell::new(0) }
    }

    pub(crate) fn moved(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// Reports each time that the server was lost and came back.
    pub(crate) fn note_losses(&self, losses: u64) {
        if losses > self.losses.replace(losses) {
            self.report("the connection to the server was lost and is restored; the copy continues");
        }
    }

    /// Prints a line above the bar.
    pub(crate) fn report(&self, line: &str) {
        self.bar.suspend(|| eprintln!("ringpass-dd: {line}"));
    }

    /// Prints the last line.
    pub(crate) fn finish(&self, done: &str, transfer: &Transfer<'_>) {
        self.bar.finish_and_clear();
        let seconds = self.begin.elapsed().as_secs_f64();
        let bytes = transfer.moved_bytes();
        let rate = BinaryBytes((bytes as f64 / seconds.max(1e-9)) as u64);
        eprintln!("{done} {bytes} bytes ({}) in {seconds:.3} s, {rate}/s; {}", BinaryBytes(bytes), transfer.summary());
    }
}
