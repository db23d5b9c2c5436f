//! A hostile process guest runs the script of everything that a guest must not be able to do. It changes nothing
//! outside: not other memory and files of the broker, not another guest, and not the parts of the disk that are not its
//! own.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use ringpass_restrictions::Access;
use ringpass_tests::{
    disks::DiskKind,
    harness::{self, test},
    hostile_run::{DISK_BYTES, Rules, Run, child_task, run},
    needs::Need,
    process_guest::Place,
};

mod child;
mod guest;

fn main() -> ExitCode {
    match child_task().and_then(|task| task.map(|task| child::main(&task)).transpose()) {
        Ok(None) => {}
        Ok(Some(())) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
    }
    let mut tests = Vec::new();
    for access in [Access::ReadWrite, Access::ReadOnly] {
        for place in [Place::GuestRam, Place::Window] {
            for sq_thread in [true, false] {
                let how = if sq_thread { "sq_thread" } else { "doorbell" };
                let on_what = if access == Access::ReadOnly { "read_only" } else { "read_write" };
                let run = Run { access, place, sq_thread, ..Run::STRICT };
                tests.push(test(
                    format!("a_hostile_guest_reaches_nothing_but_its_own_{on_what}_{place}_{how}"),
                    needs(),
                    move || [true, false].into_iter().try_for_each(|direct_io| strict(Run { direct_io, ..run })),
                ));
            }
        }
    }
    tests.push(test("the_script_damages_files_without_the_fixed_file_rule", needs(), without_fixed_file));
    tests.push(test("the_script_damages_memory_if_the_policy_allows_plain_reads", needs(), with_plain_read));
    tests.push(test("the_script_grows_the_image_without_the_limit", needs(), without_limit));
    harness::run(tests)
}

fn needs() -> Vec<Need> {
    DiskKind::Ext4PageCache.needs().into_iter().chain([Need::io_uring(), Need::cpus(2)]).collect()
}

fn strict(how: Run) -> Result<()> {
    let outcome = run(how)?;
    ensure!(outcome.findings.is_empty(), "{how:?}: {}", outcome.text());
    ensure!(outcome.steps > 6000, "{how:?}: only {} steps were tried", outcome.steps);
    ensure!(outcome.image_bytes == DISK_BYTES, "{how:?}: the image has {} bytes", outcome.image_bytes);
    if how.access == Access::ReadOnly {
        ensure!(outcome.disk_is_same, "{how:?}: the read-only disk has changed");
    } else {
        // Without this the last comparison would show nothing.
        ensure!(!outcome.disk_is_same, "{how:?}: the guest has written nothing to its own disk");
    }
    Ok(())
}

fn without_fixed_file() -> Result<()> {
    let outcome = run(Run { rules: Rules::AnyFile, ..Run::STRICT })?;
    ensure!(outcome.has("answer: plain descriptor"), "{}", outcome.text());
    ensure!(outcome.has("damage: file"), "{}", outcome.text());
    Ok(())
}

fn with_plain_read() -> Result<()> {
    let outcome = run(Run { rules: Rules::PlainRead, access: Access::ReadOnly, ..Run::STRICT })?;
    ensure!(outcome.has("answer: operation with flags 0x1 (opcode 22)"), "{}", outcome.text());
    ensure!(outcome.has("damage: memory of the broker"), "{}", outcome.text());
    Ok(())
}

fn without_limit() -> Result<()> {
    let outcome = run(Run { capped: false, ..Run::STRICT })?;
    ensure!(outcome.has("answer: "), "{}", outcome.text());
    ensure!(!outcome.has("damage: "), "{}", outcome.text());
    ensure!(outcome.image_bytes > DISK_BYTES, "the image has not grown");
    Ok(())
}
