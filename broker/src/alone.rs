//! Tests that measure the whole process (its pinned memory, its threads), and so need a process of their own.

use std::process::Command;

/// The variable that names the test for which a process was started.
const VARIABLE: &str = "RINGPASS_TEST_ALONE";

/// Runs the body of the named test (the name includes its modules) where no other test runs: in this process if it was
/// started for that test, as cargo-nextest does for each test, otherwise in a new process.
pub(crate) fn alone(test: &str, body: impl FnOnce()) {
    let is_own = |variable, value: &str| std::env::var(variable).is_ok_and(|found| found == value);
    if is_own(VARIABLE, test) || is_own("NEXTEST_EXECUTION_MODE", "process-per-test") {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args([test, "--exact", "--nocapture"]).env(VARIABLE, test).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && stdout.contains("1 passed"), "{}: {stdout}\n{stderr}", output.status);
}
