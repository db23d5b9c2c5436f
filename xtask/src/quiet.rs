//! Checks the promised speed of ringpass in the demo's report, on a machine that does nothing else.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::steps::cargo;

/// The polling ways: they must be as fast as the host.
const POLLING: [&str; 3] = ["process", "process-vhost-user", "kvm-poll"];
const DEPTHS: [u64; 2] = [1, 32];
const RATIO_TO_HOST_MAX: f64 = 1.05;
/// Limit of all exits of a polling virtual machine, including those for interrupts of the host.
const EXITS_PER_IO_MAX: f64 = 0.01;

/// Runs the demo, each way for `seconds` at each depth, and checks its report.
pub(crate) fn run(seconds: Option<u64>) -> Result<()> {
    let seconds = seconds.unwrap_or(5).to_string();
    let mut demo = cargo(&["run", "--release", "--quiet", "--package", "ringpass", "--bin", "ringpass", "--"]);
    demo.args(["demo", "--json", "--seconds", &seconds]).stderr(Stdio::inherit());
    let output = demo.output().context("cannot start the demo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    ensure!(output.status.success(), "the demo failed: {}", output.status);
    let failures = failures(&serde_json::from_str(&text).context("cannot parse the demo's report")?);
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(())
}

/// The results that are slower than promised, or missing.
fn failures(report: &Value) -> Vec<String> {
    let mut failures = Vec::new();
    for (name, depth) in POLLING.into_iter().flat_map(|name| DEPTHS.map(|depth| (name, depth))) {
        let is_it = |way: &&Value| way["name"] == name && way["depth"] == depth;
        let Some(way) = report["ways"].as_array().and_then(|ways| ways.iter().find(is_it)) else {
            failures.push(format!("{name} at depth {depth} did not run: {}", report["skipped"]));
            continue;
        };
        let mut must = |field: &str, is_fine: fn(f64) -> bool, limit: f64| {
            // A missing number is a failure.
            if !way[field].as_f64().is_some_and(is_fine) {
                failures.push(format!("{name} at depth {depth}: {field} is {}, the limit is {limit}", way[field]));
            }
        };
        must("errors", |count| count == 0.0, 0.0);
        must("ratio_to_host", |ratio| ratio <= RATIO_TO_HOST_MAX, RATIO_TO_HOST_MAX);
        if name.starts_with("kvm-") {
            must("exits_per_io", |exits| exits < EXITS_PER_IO_MAX, EXITS_PER_IO_MAX);
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report(ratio: f64, exits: Option<f64>) -> Value {
        let way = |name: &str, depth: u64, exits: Option<f64>| json!({"name": name, "depth": depth, "errors": 0, "ratio_to_host": ratio, "exits_per_io": exits});
        json!({
            "ways": [
                way("process", 1, None),
                way("process", 32, None),
                way("process-vhost-user", 1, None),
                way("process-vhost-user", 32, None),
                way("kvm-poll", 1, exits),
                way("kvm-poll", 32, exits),
            ],
            "skipped": [],
        })
    }

    #[test]
    fn only_a_fast_and_complete_report_passes() {
        assert_eq!(failures(&report(1.05, Some(0.009))), [""; 0]);
        assert_eq!(failures(&report(1.06, Some(0.0))).len(), 6);
        assert_eq!(failures(&report(1.0, Some(0.01))).len(), 2);
        assert_eq!(failures(&report(1.0, None)).len(), 2);
        assert_eq!(failures(&json!({"ways": [], "skipped": []})).len(), 6);
    }
}
