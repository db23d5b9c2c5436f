//! Builds the bare-metal guest program, which the crate embeds.
//!
//! A separate cargo builds the program, because it needs another panic strategy and other linker arguments than the
//! rest of the workspace. This cargo has its own target directory, because the outer cargo holds the lock of the usual
//! one.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The compiler flags. They allow only baseline x86-64, because the program does not enable any other processor state.
const RUSTFLAGS: &str = "-Ctarget-cpu=x86-64\x1f-Crelocation-model=static";
/// The sources of the image.
const SOURCES: [&str; 7] = [
    "guest-driver/bare-metal",
    "guest-driver/workload/Cargo.toml",
    "guest-driver/workload/src",
    "guest-abi/Cargo.toml",
    "guest-abi/src",
    "Cargo.lock",
    "Cargo.toml",
];

fn main() {
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let workspace = here.ancestors().nth(2).expect("the crate lies two levels below the workspace");
    let guest = workspace.join("guest-driver/bare-metal");
    println!("cargo::rerun-if-changed=build.rs");
    for source in SOURCES {
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
    // Offline, because the outer cargo has fetched all dependencies for this crate.
    cargo
        .current_dir(workspace)
        .args(["rustc", "--locked", "--offline", "--package=ringpass-bare-metal", "--bin=ringpass-bare-metal"])
        .args(["--features=image", "--profile=bare-metal", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .arg("--");
    for argument in arguments {
        cargo.arg(format!("-Clink-arg={argument}"));
    }
    forget_the_host(&mut cargo);
    let status = cargo.status().expect("cargo can be started, because it started this program");
    assert!(status.success(), "building the bare-metal guest failed: {status}");

    let image = target_dir.join(TARGET).join("bare-metal/ringpass-bare-metal");
    println!("cargo::rustc-env=RINGPASS_BARE_METAL_IMAGE={}", image.display());
}

/// Removes the settings for programs of this machine (coverage, sanitizers, clippy, another processor) that the outer
/// cargo has from the environment or from a configuration file.
fn forget_the_host(cargo: &mut Command) {
    for (name, _) in env::vars_os() {
        let foreign = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_"];
        if name.to_str().is_some_and(|name| foreign.iter().any(|prefix| name.starts_with(prefix))) {
            cargo.env_remove(name);
        }
    }
    cargo.env_remove("RUSTFLAGS");
    // Set these instead of removing them, because they override every configuration file. An empty wrapper means none.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS);
    cargo.env("RUSTC_WRAPPER", "").env("RUSTC_WORKSPACE_WRAPPER", "");
    cargo.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER", "cc");
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("cargo sets {name} for build scripts: {error}"))
}
