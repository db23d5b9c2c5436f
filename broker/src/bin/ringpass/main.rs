//! `ringpass`: the broker as a program.

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

/// Gives guests the host's io_uring in their own memory.
#[derive(Debug, Parser)]
#[command(name = "ringpass", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves a disk to a virtual machine, as a vhost-user-blk device.
    Serve(serve::ServeArgs),
    /// Looks at served devices.
    Dev(dev::DevCommand),
    /// Shows verified I/O of guests that drive the host's io_uring, beside a plain host process.
    Demo(demo::DemoArgs),
    /// Tells what this kernel and these limits allow, and what to change for the rest.
    Probe(probe::ProbeArgs),
    /// Tells what a restriction policy lets a guest do.
    Policy(policy::PolicyCommand),
}

fn main() -> ExitCode {
    // Not a command for people, so the command line does not know it.
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
