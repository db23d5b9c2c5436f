//! `vhost-user-ringpass`: `ringpass serve` as a vhost-user back-end program.
//!
//! The program follows the conventions that front-ends and management software expect of back-end programs (QEMU,
//! docs/interop/vhost-user.rst, "Backend program conventions"): it has no subcommand and knows `--print-capabilities`.
//! `share/qemu/vhost-user/50-vhost-user-ringpass.json` describes the program to management software.

#[path = "../chosen_policy.rs"]
mod chosen_policy;
#[path = "../log/mod.rs"]
mod log;
#[path = "../refusal.rs"]
mod refusal;
#[path = "../runtime_dir.rs"]
mod runtime_dir;
#[path = "../serve/mod.rs"]
mod serve;

use std::process::ExitCode;

use clap::Parser;

/// Serve a disk to a virtual machine as a vhost-user-blk device.
#[derive(Debug, Parser)]
#[command(name = "vhost-user-ringpass", version, long_about = None)]
struct Arguments {
    #[command(flatten)]
    serve: serve::ServeArgs,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log::start(serve::LOG_LEVEL);
    log::exit_code("vhost-user-ringpass", serve::run(&arguments.serve))
}
