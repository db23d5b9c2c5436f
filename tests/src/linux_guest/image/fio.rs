//! fio as one static program, which runs in a guest without its libraries.

use std::{fs, path::Path, process::Command, thread};

use anyhow::{Context, Result};

use crate::debian::apt::{Apt, run};

/// Without features that need libraries of their own, and without code for this machine's CPU, which the guest may not
/// have.
const OPTIONS: [&str; 15] = [
    "--build-static",
    "--disable-native",
    "--disable-numa",
    "--disable-rdma",
    "--disable-rados",
    "--disable-rbd",
    "--disable-http",
    "--disable-gfapi",
    "--disable-libnfs",
    "--disable-lex",
    "--disable-pmem",
    "--disable-xnvme",
    "--disable-libzbc",
    "--disable-tcmalloc",
    "--disable-dfs",
];

/// Builds fio from its source package, with libaio from the package libaio-dev, which is not installed either.
///
/// # Errors
///
/// A package cannot be downloaded, or the sources do not build.
pub(super) fn build(apt: &Apt, program: &Path) -> Result<()> {
    let directory = tempfile::tempdir().context("cannot make a directory for fio")?;
    let (sources, libaio) = (directory.path().join("fio"), directory.path().join("libaio"));
    for path in [&sources, &libaio] {
        fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    apt.unpack_source("fio", &sources)?;
    apt.unpack("libaio-dev", &libaio)?;

    let in_sources = |program: &str| {
        let mut command = Command::new(program);
        command
            .current_dir(&sources)
            .env("C_INCLUDE_PATH", libaio.join("usr/include"))
            .env("LIBRARY_PATH", libaio.join("usr/lib/x86_64-linux-gnu"))
            // A make that runs the tests would pass on its own options.
            .env_remove("MAKEFLAGS");
        command
    };
    let configured = run(in_sources("./configure").args(OPTIONS)).context("cannot configure fio")?;
    anyhow::ensure!(
        configured.lines().any(|line| line.starts_with("Linux AIO support ") && line.ends_with("yes")),
        "fio would be built without libaio:\n{configured}"
    );
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    run(in_sources("make").args([&format!("--jobs={jobs}"), "fio"])).context("cannot build fio")?;
    run(Command::new("strip").arg("-o").arg(program).arg(sources.join("fio"))).context("cannot strip fio").map(drop)
}
