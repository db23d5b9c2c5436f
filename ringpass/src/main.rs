//! `ringpass`: the broker as a command-line program.
//!
//! `cargo doc --open` begins here. The crates of the workspace are:
//!
//! | crate | what it is for |
//! | --- | --- |
//! | [`ringpass_broker`] | gives guests rings, and serves disks over vhost-user |
//! | [`ringpass_guest_abi`] | what a guest and the broker agree on, and the driver's side of a ring |
//! | [`ringpass_guest`] | a driver for a process that is its own guest |
//! | [`ringpass_restrictions`] | policies for rings with untrusted submitters |
//! | [`ringpass_vmm`] | the monitor of the demo's virtual machine |
//! | [`ringpass_bare_metal`] | the guest in that machine |
//! | [`ringpass_workload`] | what the guests of the demo and of the tests do |

mod chosen_policy;
mod demo;
mod dev;
mod log;
mod policy;
mod probe;
mod refusal;
mod runtime_dir;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Give guests the host's io_uring in their own memory.
#[derive(Debug, Parser)]
#[command(name = "ringpass", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a disk to a virtual machine as a vhost-user-blk device.
    Serve(Box<serve::ServeArgs>),
    /// Inspect the devices that `ringpass serve` serves.
    Dev(dev::DevCommand),
    /// Run verified I/O in guests that drive the host's io_uring, and compare it with a plain host process.
    Demo(demo::DemoArgs),
    /// Report what this kernel and these limits allow, and what to change for the rest.
    Probe(probe::ProbeArgs),
    /// Report what a restriction policy lets a guest do.
    Policy(policy::PolicyCommand),
}

fn main() -> ExitCode {
    // Only the demo starts the program as a guest, so the command line does not list this command.
    if demo::guest::is_wanted() {
        log::start("warn");
        return log::exit_code("ringpass", demo::guest::run().map(|()| ExitCode::SUCCESS));
    }
    let command = Arguments::parse().command;
    // Standard output is for results only.
    log::start(if matches!(command, Command::Serve(_)) { serve::LOG_LEVEL } else { "warn" });
    let result = match command {
        Command::Serve(args) => serve::run(&args),
        Command::Dev(command) => dev::run(&command),
        Command::Demo(args) => demo::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Policy(command) => policy::run(&command),
    };
    log::exit_code("ringpass", result)
}
