//! Code that has taken a confined server over: the test makes system calls in the server, and through an io_uring that
//! they set up, and looks at what is refused. The server serves on afterwards.

#[cfg(target_arch = "x86_64")]
mod attempts;
#[cfg(target_arch = "x86_64")]
mod ring;
#[cfg(target_arch = "x86_64")]
mod tracee;

use std::process::ExitCode;

use ringpass_tests::harness;

#[cfg(target_arch = "x86_64")]
fn main() -> ExitCode {
    use ringpass_tests::{broker_process, harness::test, needs::Need};

    let needs = || broker_process::needs().into_iter().chain([Need::root()]).collect::<Vec<Need>>();
    harness::run(vec![
        test("injected_code_cannot_make_the_image_grow", needs(), attempts::growth),
        test("injected_code_reaches_no_other_process", needs(), attempts::processes),
        test("injected_code_sees_and_makes_no_other_file", needs(), attempts::files),
        test("injected_code_reaches_no_socket_outside_the_server_s_directory", needs(), attempts::sockets),
        test("what_a_ring_of_injected_code_still_reaches_is_known", needs(), attempts::known_open),
    ])
}

#[cfg(not(target_arch = "x86_64"))]
fn main() -> ExitCode {
    // The registers of a system call differ between architectures.
    harness::run(vec![])
}
