//! Builds the bare-metal guest program, to be embedded.
//!
//! It is built by a cargo of its own: it needs another panic strategy and other linker arguments than everything else,
//! and a target directory of its own, since the outer cargo holds the lock of its own.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let workspace = here.ancestors().nth(2).expect("the crate lies two levels below the workspace");
    let guest = workspace.join("guest-driver/bare-metal");
    for source in ["guest-driver/bare-metal", "guest-driver/workload/src", "guest-abi/src", "Cargo.lock", "Cargo.toml"]
    {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let target_dir = Path::new(&variable("OUT_DIR")).join("guest");

    let script = guest.join("program.ld");
    let arguments = [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        &format!("-T{}", script.display()),
        "-Wl,--oformat=binary",
    ];
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .current_dir(workspace)
        .args(["rustc", "--locked", "--package=ringpass-bare-metal", "--bin=ringpass-bare-metal", "--features=image"])
        .args(["--profile=bare-metal", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .args(["--", "-Crelocation-model=static"]);
    for argument in arguments {
        cargo.arg(format!("-Clink-arg={argument}"));
    }
    // What the outer cargo was told for programs of this machine: coverage, sanitizers, clippy.
    for foreign in
        ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET"]
    {
        cargo.env_remove(foreign);
    }
    let status = cargo.status().expect("cargo can be started, it started this");
    assert!(status.success(), "building the bare-metal guest failed: {status}");

    let image = target_dir.join(TARGET).join("bare-metal/ringpass-bare-metal");
    println!("cargo::rustc-env=RINGPASS_BARE_METAL_IMAGE={}", image.display());
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("cargo sets {name} for build scripts: {error}"))
}
