//! `vhost-user-ringpass`: `ringpass serve` under the conventions that front-ends and management software have for
//! programs of vhost-user back-ends (QEMU, docs/interop/vhost-user.rst, "Backend program conventions"): no subcommand, and
//! `--print-capabilities`. `share/qemu/vhost-user/50-vhost-user-ringpass.json` describes it to them.

#[path = "ringpass/chosen_policy.rs"]
mod chosen_policy;
#[path = "ringpass/log/mod.rs"]
mod log;
#[path = "ringpass/refusal.rs"]
mod refusal;
#[path = "ringpass/runtime_dir.rs"]
mod runtime_dir;
#[path = "ringpass/serve/mod.rs"]
mod serve;

use std::process::ExitCode;

use clap::Parser;

/// Serves a disk to a virtual machine, as a vhost-user-blk device.
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
