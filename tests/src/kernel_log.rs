//! The kernel's warnings during a test, from `/dev/kmsg` (see `Documentation/ABI/testing/dev-kmsg` of the Linux
//! source).
//!
//! A test of kernel interfaces that passes while the kernel prints a warning has found a bug and lost it. So the
//! harness takes a position in the kernel log before a test, and looks after it at what the kernel itself has printed
//! since.
//!
//! This file uses `std`, `rustix` and, in its tests, `tempfile` only: `xtask` compiles it too, to check a whole run.

use std::{
    env,
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Environment variable: a regular file with lines as in `/dev/kmsg` to read instead. For the harness's own tests.
pub const PATH_VARIABLE: &str = "RINGPASS_KERNEL_LOG";

/// A record is at most this long (`PRINTK_MESSAGE_MAX` is 2048; Linux before 6.6 used 8192 for the device).
const LONGEST_RECORD_BYTES: usize = 8192;

/// Parts of messages that the kernel prints when something is wrong with it. Each part begins a word.
const TROUBLE: &[&str] = &[
    "BUG:",
    "BUG ",
    "WARNING:",
    "Oops",
    "UBSAN:",
    "KASAN:",
    "KCSAN:",
    "KFENCE:",
    "general protection fault",
    "refcount_t:",
    "list_add corruption",
    "list_del corruption",
    "possible circular locking dependency",
    "possible recursive locking",
    "soft lockup",
    "detected stall",
    "blocked for more than",
    "leaked percpu",
];

/// A position in the kernel log. A test reads the later messages from it.
#[derive(Debug)]
pub struct KernelLog {
    file: File,
}

impl KernelLog {
    /// Takes the position behind the last message so far.
    ///
    /// # Errors
    ///
    /// `/dev/kmsg` cannot be opened. That needs root or `CAP_SYSLOG` where `kernel.dmesg_restrict` is 1, and many
    /// containers do not have it at all.
    pub fn now() -> io::Result<Self> {
        let path = env::var_os(PATH_VARIABLE).unwrap_or_else(|| OsString::from("/dev/kmsg"));
        Self::at_end_of(path.as_ref())
    }

    fn at_end_of(path: &Path) -> io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32).open(path)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { file })
    }

    /// The kernel's own messages since the position that report trouble in the kernel. The position moves behind them.
    ///
    /// # Errors
    ///
    /// Reading failed. Messages that the kernel has already overwritten are not an error: this reads the rest.
    pub fn trouble(&mut self) -> io::Result<Vec<String>> {
        Ok(trouble_in(&self.read_new()?))
    }

    fn read_new(&mut self) -> io::Result<String> {
        let mut new = Vec::new();
        let mut record = [0; LONGEST_RECORD_BYTES];
        loop {
            match self.file.read(&mut record) {
                Ok(0) => break,
                Ok(length_bytes) => new.extend_from_slice(&record[..length_bytes]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // EPIPE: the kernel has overwritten the next record. The next read gets the oldest existing one.
                Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(String::from_utf8_lossy(&new).into_owned())
    }
}

/// Returns the messages that report trouble from records in the format of `/dev/kmsg`.
fn trouble_in(records: &str) -> Vec<String> {
    records.lines().filter_map(kernel_message).filter(|message| is_trouble(message)).map(str::to_owned).collect()
}

/// The text of a record, if the kernel itself wrote it: `priority,sequence,time,flags;text`, facility 0.
/// Lines that begin with a space belong to the record before them and hold no text.
fn kernel_message(line: &str) -> Option<&str> {
    let (prefix, message) = line.split_once(';')?;
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    let facility = priority >> 3;
    (facility == 0).then_some(message)
}

/// Whether a message of a kernel, this machine's or a guest's, reports trouble in that kernel.
pub fn is_trouble(message: &str) -> bool {
    let begins_a_word = |at: usize| !message[..at].ends_with(|c: char| c.is_ascii_alphanumeric());
    TROUBLE.iter().any(|sign| message.match_indices(sign).any(|(at, _)| begins_a_word(at)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_log_reports_each_trouble_once_and_only_after_its_position() {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        let path = file.path().to_owned();
        let mut kernel_prints = |message: &str| writeln!(file, "4,1,1,-;{message}").expect("an append");
        kernel_prints("WARNING: before the position");
        let mut log = KernelLog::at_end_of(&path).expect("the file opens");
        assert!(log.trouble().expect("a read").is_empty());
        kernel_prints("WARNING: after it");
        assert_eq!(log.trouble().expect("a read"), ["WARNING: after it"]);
        assert!(log.trouble().expect("a read").is_empty());
        // These messages are more than one read returns.
        (0..1000).for_each(|count| kernel_prints(&format!("an ordinary message, number {count}")));
        kernel_prints("BUG: behind them");
        assert_eq!(log.trouble().expect("a read"), ["BUG: behind them"]);
    }

    #[test]
    fn kernel_bugs_are_trouble_and_ordinary_messages_are_not() {
        let records = "6,100,5000,-;loop0: detected capacity change from 0 to 2048\n \
                       SUBSYSTEM=block\n\
                       4,101,5001,-;WARNING: CPU: 1 PID: 77 at io_uring/rw.c:12 io_read+0x1/0x2\n\
                       3,102,5002,-;INFO: task iou-sqp-77:78 blocked for more than 120 seconds.\n\
                       1,103,5003,-;BUG: kernel NULL pointer dereference, address: 0000000000000000\n\
                       6,104,5004,-;EXT4-fs (loop0): mounted filesystem\n\
                       7,105,5005,-;usb 1-1: DEBUG: endpoint 1\n\
                       2,106,5006,-;kernel BUG at io_uring/io_uring.c:9!\n";
        assert_eq!(
            trouble_in(records),
            [
                "WARNING: CPU: 1 PID: 77 at io_uring/rw.c:12 io_read+0x1/0x2",
                "INFO: task iou-sqp-77:78 blocked for more than 120 seconds.",
                "BUG: kernel NULL pointer dereference, address: 0000000000000000",
                "kernel BUG at io_uring/io_uring.c:9!",
            ]
        );
    }

    #[test]
    fn messages_of_programs_in_the_kernel_log_are_no_trouble() {
        let records = "12,100,5000,-;BUG: says a program, with facility 1\n";
        assert!(trouble_in(records).is_empty());
    }

    #[test]
    fn continued_values_and_garbage_are_not_messages() {
        assert!(trouble_in(" DEVICE=BUG:;WARNING:\nno record at all; BUG:\n").is_empty());
    }
}
