//! The end of the process where this library cannot continue. A program can register work to do before, such as writing
//! its log.

use std::sync::OnceLock;

use crate::socket_file::remove_socket_files;

static LAST_WORK: OnceLock<fn()> = OnceLock::new();

/// Makes this library call `work` before it ends the process. Only the first call takes effect.
pub fn before_process_end(work: fn()) {
    let _ = LAST_WORK.set(work);
}

/// Ends the process without running destructors. Removes its socket files first.
pub(crate) fn end_process(status: i32) -> ! {
    remove_socket_files();
    if let Some(work) = LAST_WORK.get() {
        work();
    }
    std::process::exit(status)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn registered_work_is_done_before_the_end_of_the_process() {
        const NAME: &str = "process_end::tests::registered_work_is_done_before_the_end_of_the_process";
        const IS_CHILD: &str = "RINGPASS_TEST_ENDS_ITS_PROCESS";
        if std::env::var_os(IS_CHILD).is_some() {
            before_process_end(|| eprintln!("the last words"));
            end_process(3);
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output = child.args(["--exact", NAME, "--nocapture"]).env(IS_CHILD, "1").output().unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert!(String::from_utf8_lossy(&output.stderr).contains("the last words"));
    }
}
