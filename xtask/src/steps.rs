//! Runs other programs, and the named, timed steps of a task.

use std::{
    env,
    ffi::OsString,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// The finished steps of a task, with their times.
#[derive(Default)]
pub(crate) struct Steps {
    done: Vec<(&'static str, Duration)>,
}

impl Steps {
    /// Runs one step. Its error names the step.
    pub(crate) fn run(&mut self, name: &'static str, step: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("\n==> {name}");
        let start = Instant::now();
        let result = step();
        self.done.push((name, start.elapsed()));
        result.with_context(|| format!("the step \"{name}\" failed"))
    }

    /// Prints the time of each step.
    pub(crate) fn print_times(&self) {
        println!("\nTime of each step:");
        for (name, time) in &self.done {
            println!("  {:>7.1} s  {name}", time.as_secs_f64());
        }
        let total: Duration = self.done.iter().map(|(_, time)| *time).sum();
        println!("  {:>7.1} s  total", total.as_secs_f64());
    }
}

/// A command for the Cargo that started this program.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.args(arguments);
    command
}

/// Runs a command to its end with the input and output of this program.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = command_line(command);
    println!("$ {line}");
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}

/// Runs a command to its end, beside others. Its output is shown as a whole when it ends.
pub(crate) fn run_apart(command: &mut Command) -> Result<()> {
    let line = command_line(command);
    println!("$ {line}");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{line}`"))?;
    let text = [output.stdout, output.stderr].concat();
    println!("\noutput of `{line}`:\n{}", String::from_utf8_lossy(&text).trim_end());
    if !output.status.success() {
        bail!("`{line}` failed: {}", output.status);
    }
    Ok(())
}

/// Runs a command to its end. Its output is shown only if it fails.
pub(crate) fn run_quietly(command: &mut Command) -> Result<()> {
    let line = command_line(command);
    println!("$ {line}");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{line}`"))?;
    if !output.status.success() {
        bail!("`{line}`: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Whether a program exists and runs with these arguments. Its output is not shown.
pub(crate) fn is_available(program: &str, arguments: &[&str]) -> bool {
    is_success(Command::new(program).args(arguments))
}

/// Whether cargo-nextest is installed.
pub(crate) fn has_nextest() -> bool {
    is_success(&mut cargo(&["nextest", "--version"]))
}

fn is_success(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// The command as a user would type it, with the variables that are set for it.
pub(crate) fn command_line(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        let value = value?.to_string_lossy();
        Some(format!("{}={}", name.to_string_lossy(), quoted(&value)))
    });
    let program = command.get_program().to_string_lossy();
    // Cargo passes its own full path, but a user types its name.
    let program = if program.ends_with("/cargo") { "cargo".into() } else { program };
    let words = [program].into_iter().chain(command.get_args().map(|word| word.to_string_lossy()));
    variables.chain(words.map(|word| quoted(&word))).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_typed_again() {
        let mut command = Command::new("/some/where/cargo");
        command.args(["doc", "--filter", "package(a) & test(=b)"]).env("RUSTDOCFLAGS", "-D warnings");
        assert_eq!(command_line(&command), "RUSTDOCFLAGS='-D warnings' cargo doc --filter 'package(a) & test(=b)'");
    }

    #[test]
    fn the_error_of_a_failed_command_states_the_command_and_its_status() {
        let error = run(Command::new("sh").args(["-c", "exit 7"])).expect_err("exit status 7").to_string();
        assert_eq!(error, "`sh -c 'exit 7'` failed: exit status: 7");
        let error = run(&mut Command::new("ringpass-no-such-program")).expect_err("no such program").to_string();
        assert_eq!(error, "cannot start `ringpass-no-such-program`");
    }

    #[test]
    fn the_error_names_the_failed_step() {
        let mut steps = Steps::default();
        let error = steps.run("lint", || bail!("it broke")).expect_err("the step fails");
        assert_eq!(format!("{error:#}"), "the step \"lint\" failed: it broke");
    }
}
