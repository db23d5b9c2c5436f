//! Status and statistics of devices as text.

use std::time::Duration;

use ringpass_broker::control::{
    ByDevice, ByGuest, DeviceStats, DeviceStatus, ExecutedBy, ModeReport, QueueStats, QueueStatus, SettableMode,
};

use ringpass_broker::printable::printable;

use super::client::Found;

pub(super) fn list(found: &[Found]) -> String {
    if found.is_empty() {
        return "no devices\n".into();
    }
    let mut rows = vec![["name", "pid", "disk"].map(str::to_owned)];
    for Found { name, pid, disk, error, .. } in found {
        let state = match (pid, error) {
            (Some(pid), _) => pid.to_string(),
            (None, None) => "gone".into(),
            (None, Some(_)) => "silent".into(),
        };
        let what = disk.as_deref().or(error.as_deref()).unwrap_or_default();
        rows.push([printable(name).to_string(), state, printable(what).to_string()]);
    }
    table(&rows)
}

pub(super) fn mode(device: &str, report: &ModeReport) -> String {
    let what = match report.mode {
        SettableMode::Virtqueue => "all queues are virtqueues",
        // `SettableMode` may have more cases in a later version of the library.
        _ => "drivers may ask for rings",
    };
    let took_ms = report.took_us as f64 / 1000.0;
    format!("{}: mode {}: {what} (after {took_ms:.1} ms)\n", printable(device), report.mode.name())
}

pub(super) fn show(status: &DeviceStatus) -> String {
    let DeviceStatus { name, pid, version, disk, mode, rings, queues } = status;
    let (name, version, mode) = (printable(name), printable(version), printable(mode));
    let access = if disk.read_only { "read-only" } else { "read-write" };
    let cache = if disk.direct_io { "direct I/O" } else { "page cache" };
    let mut text = format!(
        "{name}: pid {pid} ringpass {version} mode {mode}\n  disk {} {} bytes, blocks of {}, {access}, {cache}\n",
        printable(&disk.path),
        disk.size_bytes,
        disk.logical_block_bytes
    );
    match &rings.limits {
        Some(limits) => {
            text += &format!(
                "  rings offered: SQ up to {}, CQ up to {}, {} bytes a request; for {}\n",
                limits.sq_entries_max,
                limits.cq_entries_max,
                limits.segment_bytes_max,
                printable(&rings.wants)
            );
        }
        None => text += &format!("  rings not offered: {}\n", printable(&rings.why_not.join("; "))),
    }
    if let Some(why) = &rings.closed {
        text += &format!("  no rings at present: {}\n", printable(why));
    }
    if rings.ended_for_cost > 0 {
        let times = rings.ended_for_cost;
        text +=
            &format!("  rings ended {times} times because the guest had more requests outstanding than it may have\n");
    }
    let (used, unused): (Vec<_>, Vec<_>) = queues.iter().partition(|queue| is_worth_a_line(queue));
    for queue in used {
        text += &format!("  queue {}: {}", queue.index, executed_by(queue.executed_by));
        if let (Some(epoch), Some(phase)) = (queue.epoch, &queue.phase) {
            text += &format!(" epoch {epoch} {}", printable(phase));
        }
        if let (Some(sq_entries), Some(cq_entries)) = (queue.sq_entries, queue.cq_entries) {
            text += &format!(" sq {sq_entries} cq {cq_entries}");
        }
        if let Some(why) = &queue.why_no_ring {
            text += &format!(" ({})", printable(why));
        }
        text.push('\n');
    }
    if !unused.is_empty() {
        text += &format!("  {} of {} queues are not used\n", unused.len(), queues.len());
    }
    text
}

/// Whether the queue gets a line: a device offers many more queues than most front-ends use.
fn is_worth_a_line(queue: &QueueStatus) -> bool {
    queue.started || queue.phase.is_some() || queue.why_no_ring.is_some()
}

fn executed_by(who: ExecutedBy) -> &'static str {
    match who {
        ExecutedBy::Virtqueue => "virtqueue",
        ExecutedBy::Ring => "ring",
        ExecutedBy::BetweenRings => "between rings",
        _ => "unknown",
    }
}

const COLUMNS: [&str; 11] = [
    "queue",
    "reads",
    "read MiB",
    "writes",
    "written MiB",
    "flushes",
    "errors",
    "bounced",
    "partial writes",
    "kicks",
    "ring (guest's claim)",
];

pub(super) fn stats(stats: &DeviceStats) -> String {
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    rows.extend(stats.queues.iter().filter(|queue| has_done_something(queue)).map(|queue| row(queue, 1.0)));
    table(&rows)
}

/// Whether the queue gets a row: a device offers many more queues than most front-ends use.
fn has_done_something(queue: &QueueStats) -> bool {
    queue.by_guest.is_some() || queue.by_device != ByDevice::default()
}

/// The rates per second between two readings that are `elapsed` apart.
pub(super) fn rates(before: &DeviceStats, now: &DeviceStats, elapsed: Duration) -> String {
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    let is_restarted = is_restarted(before, now);
    // The counters of a new process started at zero with the process.
    let age = now.age_ms.filter(|_| is_restarted).map(Duration::from_millis);
    let seconds = age.unwrap_or(elapsed).min(elapsed).as_secs_f64().max(1e-3);
    for now in now.queues.iter().filter(|now| has_done_something(now)) {
        let before = before.queues.iter().find(|before| before.index == now.index && !is_restarted);
        rows.push(row(&before.map_or(*now, |before| difference(before, now)), seconds));
    }
    table(&rows)
}

/// Whether a new process counts now, from zero.
fn is_restarted(before: &DeviceStats, now: &DeviceStats) -> bool {
    match (before.started_ms, now.started_ms) {
        (Some(before), Some(now)) => before != now,
        // The server does not state when it started. Within one process no counter ever falls.
        _ => before.queues.iter().zip(&now.queues).any(|(before, now)| fell(before, now)),
    }
}

fn fell(before: &QueueStats, now: &QueueStats) -> bool {
    let (was, is) = (before.by_device, now.by_device);
    let pairs = [(was.reads, is.reads), (was.writes, is.writes), (was.flushes, is.flushes), (was.kicks, is.kicks)];
    let submitted = |stats: &QueueStats| stats.by_guest.unwrap_or_default().submitted;
    pairs.into_iter().any(|(was, is)| is < was) || submitted(now) < submitted(before)
}

fn difference(before: &QueueStats, now: &QueueStats) -> QueueStats {
    let (was, mut is) = (before.by_device, now.by_device);
    for (is, was) in [
        (&mut is.reads, was.reads),
        (&mut is.read_bytes, was.read_bytes),
        (&mut is.writes, was.writes),
        (&mut is.written_bytes, was.written_bytes),
        (&mut is.flushes, was.flushes),
        (&mut is.failed, was.failed),
        (&mut is.refused, was.refused),
        (&mut is.bounced, was.bounced),
        (&mut is.partial_writes, was.partial_writes),
        (&mut is.kicks, was.kicks),
    ] {
        *is = is.saturating_sub(was);
    }
    // The guest writes the counters of rings and can write anything.
    let was = before.by_guest.unwrap_or_default();
    let by_guest = now.by_guest.map(|is| ByGuest {
        submitted: is.submitted.saturating_sub(was.submitted),
        completed: is.completed.saturating_sub(was.completed),
    });
    QueueStats { index: now.index, by_device: is, by_guest }
}

fn row(queue: &QueueStats, seconds: f64) -> [String; 11] {
    let each = |count: u64| format!("{:.0}", count as f64 / seconds);
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / seconds / f64::from(1 << 20));
    let by = &queue.by_device;
    [
        queue.index.to_string(),
        each(by.reads),
        mib(by.read_bytes),
        each(by.writes),
        mib(by.written_bytes),
        each(by.flushes),
        each(by.failed + by.refused),
        each(by.bounced),
        each(by.partial_writes),
        each(by.kicks),
        queue.by_guest.map_or_else(|| "-".into(), |by| each(by.completed)),
    ]
}

/// Formats rows as aligned columns.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or_default());
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use ringpass_broker::control::{DiskStatus, RingsOffer};

    use super::*;

    fn counted(reads: u64, completed: u64, started_ms: Option<u64>) -> DeviceStats {
        let by_device = ByDevice { reads, read_bytes: reads << 20, ..ByDevice::default() };
        let by_guest = Some(ByGuest { submitted: completed, completed });
        let queues = vec![QueueStats { index: 1, by_device, by_guest }];
        DeviceStats { name: "vm1".into(), started_ms, age_ms: started_ms.map(|_| 500), queues }
    }

    fn last_row(before: &DeviceStats, now: &DeviceStats) -> Vec<String> {
        let text = rates(before, now, Duration::from_secs(2));
        text.lines().last().unwrap().split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn rates_are_per_second_between_two_counts_of_one_process() {
        for started_ms in [None, Some(7)] {
            let row = last_row(&counted(100, 1000, started_ms), &counted(300, 5000, started_ms));
            assert_eq!(row, ["1", "100", "100.0", "0", "0.0", "0", "0", "0", "0", "0", "2000"]);
        }
    }

    #[test]
    fn rates_of_a_restarted_server_count_from_its_start() {
        // The counters are higher than before, too: only the start time shows the new process. Its age is half a
        // second.
        let row = last_row(&counted(100, 1000, Some(7)), &counted(300, 5000, Some(8)));
        assert_eq!(row, ["1", "600", "600.0", "0", "0.0", "0", "0", "0", "0", "0", "10000"]);
        // A server that does not state when it started.
        let row = last_row(&counted(100, 1000, None), &counted(30, 50, None));
        assert_eq!(row, ["1", "15", "15.0", "0", "0.0", "0", "0", "0", "0", "0", "25"]);
    }

    #[test]
    fn a_socket_s_answer_cannot_control_the_terminal() {
        let evil = "a\u{1b}[2J\nb";
        let found = Found { name: evil.into(), pid: Some(1), disk: Some(evil.into()), socket: "s".into(), error: None };
        let disk = DiskStatus {
            path: evil.into(),
            size_bytes: 512,
            logical_block_bytes: 512,
            read_only: false,
            direct_io: false,
        };
        let (why_not, wants) = (vec![evil.into()], evil.into());
        let rings =
            RingsOffer { offered: false, why_not, closed: Some(evil.into()), limits: None, ended_for_cost: 0, wants };
        let queue = QueueStatus {
            index: 0,
            started: true,
            executed_by: ExecutedBy::Virtqueue,
            epoch: Some(1),
            phase: Some(evil.into()),
            sq_entries: None,
            cq_entries: None,
            why_no_ring: Some(evil.into()),
        };
        let (name, version, mode) = (evil.into(), evil.into(), evil.into());
        let status = DeviceStatus { name, pid: 1, version, disk, mode, rings, queues: vec![queue] };
        for (text, lines) in [(list(&[found]), 2), (show(&status), 5)] {
            assert!(!text.contains('\u{1b}'), "{text:?}");
            assert_eq!(text.lines().count(), lines, "{text}");
        }
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [["name", "pid"].map(str::to_owned), ["a-long-name", "1"].map(str::to_owned)];
        assert_eq!(table(&rows), "name         pid\na-long-name  1\n");
    }
}
