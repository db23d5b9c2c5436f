//! `ringpass probe`: reports what this kernel and these limits allow.

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use anyhow::Context;
use clap::Parser;
use ringpass_broker::limits;
use ringpass_broker::probe::{self, Check, HoleReport, Mode, Report, Status};

/// Report what this kernel and these limits allow. For each missing thing, report why and what to change.
///
/// The report judges what `ringpass serve` could do if this user started it with these groups and limits, without
/// privileges.
///
/// The exit status is 0 if a guest can be served here in at least one mode, otherwise 1.
#[derive(Debug, clap::Args)]
pub(crate) struct ProbeArgs {
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

use crate::serve::ServeArgs;

/// Exit status when no mode is available.
const NOTHING_AVAILABLE: u8 = 1;

/// Runs `ringpass probe`.
///
/// # Errors
///
/// The machine cannot be examined, or the output cannot be written.
pub(crate) fn run(args: &ProbeArgs) -> anyhow::Result<ExitCode> {
    // The server does the same, so probe and server never disagree.
    let _ = limits::raise_open_files();
    let _ = limits::raise_memlock();
    let report = probe::run(&server_by_default()).context("cannot probe this machine")?;
    let mut out = Vec::new();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        let marks = if io::stdout().is_terminal() { Marks::COLOURED } else { Marks::PLAIN };
        write_report(&mut out, &report, &marks)?;
    }
    match io::stdout().write_all(&out) {
        // The reader has closed the pipe and wants no more output.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.context("cannot write the report")?,
    }
    Ok(if report.any_mode_available() { ExitCode::SUCCESS } else { ExitCode::from(NOTHING_AVAILABLE) })
}

/// `ringpass serve` with default options.
fn server_by_default() -> probe::Server {
    #[derive(Parser)]
    struct Defaults {
        #[command(flatten)]
        serve: ServeArgs,
    }
    Defaults::parse_from(["serve", "--socket-path", "socket", "--blk-file", "disk"]).serve.probed()
}

/// The marks at the start of lines.
struct Marks {
    ok: &'static str,
    missing: &'static str,
    not_tried: &'static str,
    information: &'static str,
}

impl Marks {
    const PLAIN: Self = Self { ok: "✓", missing: "✗", not_tried: "?", information: "·" };
    const COLOURED: Self =
        Self {
            ok: "\x1b[32m✓\x1b[0m", missing: "\x1b[31m✗\x1b[0m", not_tried: "\x1b[33m?\x1b[0m", information: "·"
        };

    fn of(&self, status: Status) -> &'static str {
        match status {
            Status::Ok => self.ok,
            Status::Missing => self.missing,
            Status::NotTried => self.not_tried,
            Status::Information => self.information,
        }
    }

    fn of_bool(&self, there: bool) -> &'static str {
        self.of(if there { Status::Ok } else { Status::Missing })
    }
}

fn write_report(out: &mut impl Write, report: &Report, marks: &Marks) -> io::Result<()> {
    let kernel = &report.kernel;
    writeln!(out, "Linux {}", kernel.title)?;
    paragraph(out, "  advice: ", &kernel.advice)?;
    write_holes(out, report, marks)?;
    writeln!(out, "\nChecks")?;
    for check in report.checks.iter().filter(|check| check.status != Status::NotTried) {
        write_check(out, check, marks)?;
    }
    let not_tried = titles(report, |check| check.status == Status::NotTried);
    if !not_tried.is_empty() {
        paragraph(
            out,
            &format!("  {} ", marks.not_tried),
            &format!("not tried because a check above failed: {not_tried}"),
        )?;
    }
    writeln!(out, "\nModes")?;
    for mode in &report.modes {
        write_mode(out, report, mode, marks)?;
    }
    writeln!(out, "\nNotes")?;
    for note in &report.notes {
        paragraph(out, "  · ", note)?;
    }
    Ok(())
}

fn write_holes(out: &mut impl Write, report: &Report, marks: &Marks) -> io::Result<()> {
    let kernel = &report.kernel;
    if kernel.holes.is_empty() {
        return writeln!(out, "  {} none of the {} known holes, judged by version", marks.ok, kernel.known_holes);
    }
    let perhaps = kernel.backports_of.as_ref().map(|vendor| format!(", unless {vendor} has fixed them"));
    writeln!(out, "  known holes, judged by version{}:", perhaps.unwrap_or_default())?;
    for HoleReport { cve, what, reached_through, reached_by_default, fixed_in, .. } in &kernel.holes {
        let mark = if *reached_by_default { marks.missing } else { marks.information };
        paragraph(out, &format!("  {mark} "), &format!("{cve}: {what}"))?;
        paragraph(out, "      ", &format!("reached through {reached_through}; fixed in {}", fixed_in.join(", ")))?;
    }
    Ok(())
}

fn write_check(out: &mut impl Write, check: &Check, marks: &Marks) -> io::Result<()> {
    let optional = if check.status == Status::Missing && check.needed_for.is_empty() { " (optional)" } else { "" };
    let mark = marks.of(check.status);
    paragraph(out, &format!("  {mark} "), &format!("{}{optional}: {}", check.title, check.detail))?;
    write_reasons(out, check.why.as_deref(), &check.change)
}

fn write_mode(out: &mut impl Write, report: &Report, mode: &Mode, marks: &Marks) -> io::Result<()> {
    let state = if mode.available { "available" } else { "not available" };
    writeln!(out, "  {} {}: {state}", marks.of_bool(mode.available), mode.name.title())?;
    let missing = titles(report, |check| check.status == Status::Missing && check.needed_for.contains(&mode.name));
    if missing.is_empty() {
        write_reasons(out, mode.why.as_deref(), &mode.change)?;
    } else {
        paragraph(out, "      why:    ", &format!("missing (see above): {missing}"))?;
    }
    for note in &mode.notes {
        paragraph(out, "      ", note)?;
    }
    Ok(())
}

fn titles(report: &Report, which: impl Fn(&Check) -> bool) -> String {
    let titles: Vec<&str> =
        report.checks.iter().filter(|check| which(check)).map(|check| check.title.as_str()).collect();
    titles.join(", ")
}

fn write_reasons(out: &mut impl Write, why: Option<&str>, change: &[String]) -> io::Result<()> {
    if let Some(why) = why {
        paragraph(out, "      why:    ", why)?;
    }
    for line in change {
        paragraph(out, "      change: ", line)?;
    }
    Ok(())
}

/// Writes `text` after `lead`, wrapped at words. Further lines are indented by the width of `lead`.
fn paragraph(out: &mut impl Write, lead: &str, text: &str) -> io::Result<()> {
    /// Columns that the report may take.
    const WIDTH: usize = 100;
    let indent = columns(lead);
    write!(out, "{lead}")?;
    let mut column = indent;
    for (index, word) in text.split_whitespace().enumerate() {
        let length = word.chars().count();
        if index > 0 && column + 1 + length > WIDTH {
            write!(out, "\n{:indent$}", "")?;
            column = indent;
        } else if index > 0 {
            write!(out, " ")?;
            column += 1;
        }
        write!(out, "{word}")?;
        column += length;
    }
    writeln!(out)
}

/// Counts the columns that text takes on a terminal. Colour codes take none.
fn columns(text: &str) -> usize {
    let mut in_colour = false;
    text.chars()
        .filter(|&c| {
            let was_in_colour = in_colour;
            in_colour = (in_colour || c == '\x1b') && c != 'm';
            !was_in_colour && c != '\x1b'
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_take_no_columns() {
        assert_eq!(columns("  \x1b[32m✓\x1b[0m mmm"), 7);
        assert_eq!(columns("      why: "), 11);
    }

    #[test]
    fn long_text_is_wrapped_and_indented_under_itself() {
        let mut out = Vec::new();
        let text = "word ".repeat(30);
        paragraph(&mut out, "  \x1b[31m✗\x1b[0m ", &text).unwrap();
        let out = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| columns(line) <= 100), "{out}");
        assert!(lines[1].starts_with("    word"), "{out}");
    }

    #[test]
    fn the_text_has_a_mark_a_reason_and_a_change_for_what_is_missing() {
        let mut report = probe::run(&server_by_default()).unwrap();
        let check = &mut report.checks[0];
        check.status = Status::Missing;
        check.why = Some("because".to_owned());
        check.change = vec!["this".to_owned(), "or that".to_owned()];
        let operations = report.checks.iter_mut().find(|check| check.name == "operations").unwrap();
        operations.status = Status::NotTried;
        let mut out = Vec::new();
        write_report(&mut out, &report, &Marks::PLAIN).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(out.contains("  ✗ io_uring: "), "{out}");
        assert!(out.contains("\n      why:    because\n      change: this\n      change: or that\n"), "{out}");
        assert!(out.contains("  ? not tried because a check above failed: operations of the direct policy\n"), "{out}");
        assert!(out.contains("      why:    missing (see above): io_uring\n"), "{out}");
        assert!(out.contains("  ✗ mediated: not available\n      why:    this version"), "{out}");
    }
}
