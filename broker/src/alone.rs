//! Tests that measure the whole process (what it has pinned, its threads), and so need a process for themselves.

use std::process::Command;

/// Names the test that a process is for.
const VARIABLE: &str = "RINGPASS_TEST_ALONE";

/// Carries out the body of the test of that name, with its modules, where no other test runs: here if this process was started for
/// it, which cargo-nextest does for each test, else in a new process.
pub(crate) fn alone(test: &str, body: impl FnOnce()) {
    let is_own = |variable, value: &str| std::env::var(variable).is_ok_and(|found| found == value);
    if is_own(VARIABLE, test) || is_own("NEXTEST_EXECUTION_MODE", "process-per-test") {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args([test, "--exact", "--nocapture"]).env(VARIABLE, test).output().unwrap();
    let (said, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{}: {said}\n{told}", output.status);
}
