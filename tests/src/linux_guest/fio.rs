//! fio in the guest, which verifies everything that it writes.

/// A shell command that runs fio on a device or a file.
///
/// fio writes its offset, a checksum and the number of the write into each block. The numbers differ from run to run. A
/// block that is lost, torn, misplaced or from another run ends the run with an error.
pub fn verify(engine: &str, target: &str, options: &str) -> String {
    format!(
        "fio --name=check --ioengine={engine} --filename={target} --direct=1 --verify=crc32c --verify_fatal=1 \
         --randrepeat=0 --output-format=terse {options} >/dev/null"
    )
}

/// A shell script that runs fio again and again, each time with other data, until [`STOP`] was run or fio finds an
/// error.
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

/// Ends the runs of [`verify_until_stopped`] after the current run.
pub const STOP: &str = "touch /tmp/stop";
