//! `cargo xtask guest`: builds the program `guest` of the tests and becomes that program.
//!
//! The program is part of the tests, because it uses their Linux guests. It is no part of this program: xtask would have
//! to build the whole workspace before its first check could report that the workspace does not build.

use std::{
    env,
    ffi::OsString,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{packages, steps::cargo};

/// Asks the program for its options, which needs no packages.
const HELP: [&str; 2] = ["--help", "-h"];

/// Builds and starts the guest's program with these options. They may have paths that start at `directory`.
pub(crate) fn run(options: &[OsString], directory: &Path) -> Result<()> {
    if !options.iter().any(|option| HELP.iter().any(|help| option == help)) {
        packages::install_missing(&packages::FOR_GUESTS)?;
    }
    // One command, so that both have the same features of their dependencies. With the output of cargo on stderr, stdout
    // belongs to the script in the guest.
    let build =
        ["build", "--package", "ringpass", "--bin", "ringpass", "--package", "ringpass-tests", "--bin", "guest"];
    let status = cargo(&build).status().context("cannot start cargo")?;
    anyhow::ensure!(status.success(), "the programs do not build: {status}");
    // This process becomes the program: Ctrl-C, the terminal and the exit status are the program's alone.
    Err(Command::new(program()?).args(options).current_dir(directory).exec()).context("cannot start the program")
}

/// The program is beside this one.
fn program() -> Result<PathBuf> {
    Ok(env::current_exe().context("cannot find this program")?.with_file_name("guest"))
}
