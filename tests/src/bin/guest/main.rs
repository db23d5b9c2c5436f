//! `cargo xtask guest`: boots a Debian kernel with the repository's Linux driver in QEMU, on a disk of `ringpass serve`,
//! and runs a demonstration, a script or a shell in the guest.

use std::process::ExitCode;

use clap::Parser;
use ringpass_tests::interruption;

mod kernel_image;
mod options;
mod session;

use options::Options;

/// The exit status if there was no guest to run a script in. (The same as of env(1) and timeout(1) for that case.)
const NO_GUEST: u8 = 125;

fn main() -> ExitCode {
    let options = Options::parse();
    // Everything that the program starts and makes ends with a value that is dropped, so an error cleans up.
    let result = interruption::watch().and_then(|()| session::run(&options));
    match (result, interruption::signal()) {
        (_, Some(signal)) => {
            eprintln!("\nended by signal {signal}");
            ExitCode::from(128 + u8::try_from(signal).unwrap_or_default())
        }
        (Ok(status), None) => ExitCode::from(status),
        (Err(error), None) => {
            eprintln!("\nFAILED: {error:#}");
            ExitCode::from(NO_GUEST)
        }
    }
}
