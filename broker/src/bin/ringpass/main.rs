//! `ringpass`: the broker as a program.

mod demo;
mod probe;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Gives guests the host's io_uring in their own memory.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows verified I/O of guests that drive the host's io_uring, beside a plain host process.
    Demo(demo::DemoArgs),
    /// Tells what this kernel and these limits allow, and what to change for the rest.
    Probe(probe::ProbeArgs),
    /// The guest's side of the demo; started by it.
    #[command(hide = true)]
    DemoGuest,
}

fn main() -> ExitCode {
    // Standard output is for results only.
    let filter = EnvFilter::try_from_env("RINGPASS_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();

    let result = match Arguments::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::DemoGuest => demo::guest::run().map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("ringpass: {error:#}");
        ExitCode::FAILURE
    })
}
