//! Code that has taken over one of the two confined processes of a server: the test makes system calls in that process,
//! and through an io_uring that they set up where they can, and looks at what is refused. The server serves on afterwards.

#[cfg(target_arch = "x86_64")]
mod attempts;
#[cfg(target_arch = "x86_64")]
mod growth;
#[cfg(target_arch = "x86_64")]
mod ring;
#[cfg(target_arch = "x86_64")]
mod tracee;

use std::process::ExitCode;

use ringpass_tests::harness;

#[cfg(target_arch = "x86_64")]
fn main() -> ExitCode {
    use ringpass_tests::{broker_process, disks::DiskKind, harness::test, needs::Need};

    use attempts::Place;

    let needs = || broker_process::needs().into_iter().chain([Need::root()]).collect::<Vec<Need>>();
    let on_disk = || needs().into_iter().chain(DiskKind::Ext4PageCache.needs()).collect::<Vec<Need>>();
    harness::run(vec![
        test("injected_code_in_the_server_makes_no_ring_and_changes_none", needs(), attempts::rings),
        test("injected_code_in_the_server_cannot_make_the_image_grow", needs(), growth::in_server),
        test("injected_code_in_the_ring_process_cannot_make_the_image_grow", on_disk(), growth::in_ring_process),
        test("injected_code_in_the_server_reaches_no_other_process", needs(), || attempts::processes(Place::Server)),
        test("injected_code_in_the_ring_process_reaches_no_other_process", needs(), || {
            attempts::processes(Place::RingProcess)
        }),
        test("injected_code_in_the_server_sees_and_makes_no_other_file", needs(), || attempts::files(Place::Server)),
        test("injected_code_in_the_ring_process_sees_and_makes_no_file", needs(), || {
            attempts::files(Place::RingProcess)
        }),
        test("injected_code_in_the_server_makes_no_socket", needs(), || attempts::sockets(Place::Server)),
        test("injected_code_in_the_ring_process_reaches_no_socket", needs(), || attempts::sockets(Place::RingProcess)),
        test("what_a_ring_of_injected_code_still_reaches_is_known", needs(), attempts::known_open),
    ])
}

#[cfg(not(target_arch = "x86_64"))]
fn main() -> ExitCode {
    // The registers of a system call differ between architectures.
    harness::run(vec![])
}
