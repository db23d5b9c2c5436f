//! fio in the guest, which verifies everything that it writes.

/// A shell command that runs fio on a device or a file.
///
/// Each block gets its offset, a checksum, and the number of the write, which differs from run to run: a block that was
/// lost, torn, misplaced or is of another run is found out, and ends the run.
pub fn verify(engine: &str, target: &str, options: &str) -> String {
    format!(
        "fio --name=check --ioengine={engine} --filename={target} --direct=1 --verify=crc32c --verify_fatal=1 \
         --randrepeat=0 --output-format=terse {options} >/dev/null"
    )
}

/// A shell script that runs fio over and over, each time with other data, until [`STOP`] was run or something is wrong.
pub fn verify_until_stopped(engine: &str, target: &str, options: &str) -> String {
    let run = verify(engine, target, options);
    format!(
        "rm -f /tmp/stop
        runs=0
        until [ -e /tmp/stop ]; do
            {run} || exit
            runs=$((runs + 1))
            echo run $runs is verified
        done"
    )
}

/// Ends the runs of [`verify_until_stopped`] after the one that is under way.
pub const STOP: &str = "touch /tmp/stop";
