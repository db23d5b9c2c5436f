//! Tasks of the ringpass repository: `cargo xtask test`, `cargo xtask repeat`, `cargo xtask soak` and others.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

mod fuzz;
mod guest;

// The reader of the kernel log, shared with the tests by its path: a dependency on the crate of the tests would build
// the whole workspace before the first check could report that it does not build.
#[path = "../../tests/src/kernel_log.rs"]
#[allow(unreachable_pub, reason = "public in the crate it belongs to")]
mod kernel_log;
mod module_circles;
mod packages;
mod publish;
mod quiet;
mod repeat;
mod soak;
mod steps;
mod test;
mod test_run;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Tasks of the ringpass repository")]
struct CommandLine {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what the tests need, then check the format, lint, build the documentation and run all tests.
    Test,
    /// Run all tests several times in a row, on an idle or a busy machine, to find tests that fail now and then.
    Repeat(repeat::Options),
    /// Run tests for a long time, with larger budgets. Without a name: list the soaks.
    Soak(soak::Options),
    /// Publish the crates that are for a registry. Refuses while an address in the repository is a placeholder.
    Publish {
        /// Upload nothing: package and compile the crates, and do all other checks of `cargo publish`.
        #[arg(long)]
        dry_run: bool,
    },
    /// Boot a Debian kernel with the Linux driver in QEMU, on a disk of `ringpass serve`: a demonstration, a shell or a
    /// script. `cargo xtask guest --help` has the options.
    #[command(disable_help_flag = true)]
    Guest {
        /// The options of the program that boots the guest.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
        options: Vec<OsString>,
    },
    /// Run the policy tests on this kernel and in guests with other kernels, and write docs/kernel-support.md.
    KernelSupport {
        /// An additional kernel (bzImage) for a guest, with initramfs, tmpfs and a serial port built in.
        #[arg(long, value_name = "IMAGE")]
        kernel: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nFAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let task = CommandLine::parse().task;
    // Resolve the paths before the directory changes.
    let task = match task {
        Task::KernelSupport { kernel } => {
            let kernel = kernel
                .iter()
                .map(std::path::absolute)
                .collect::<Result<_, _>>()
                .context("cannot resolve the path of a kernel")?;
            Task::KernelSupport { kernel }
        }
        task => task,
    };
    let directory = env::current_dir().context("cannot find the current directory")?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent directory")?;
    env::set_current_dir(root).with_context(|| format!("cannot enter {}", root.display()))?;
    match task {
        Task::Test => test::run(),
        Task::Repeat(options) => repeat::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Publish { dry_run: false } => publish::run(),
        Task::Publish { dry_run: true } => publish::package().and_then(|()| {
            publish::dry_run(|reason| {
                println!("skipped: {reason}");
                Ok(())
            })
        }),
        Task::Guest { options } => guest::run(&options, &directory),
        Task::KernelSupport { kernel } => {
            let program = ["run", "--package", "ringpass-tests", "--bin", "kernel_support", "--"];
            steps::run(steps::cargo(&program).arg("docs/kernel-support.md").args(kernel))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_words_after_guest_belong_to_the_program_of_the_guest() {
        let words = ["--kernel", "newest", "--script", "file", "--help"];
        let parsed = CommandLine::try_parse_from(["xtask", "guest"].iter().chain(&words)).expect("a command line");
        let Task::Guest { options } = parsed.task else { panic!("another task") };
        assert_eq!(options, words);
    }
}
