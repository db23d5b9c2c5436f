//! How much memory may be pinned, and huge pages.

use super::{Check, Facts, HugePagePool, ModeName, Outcome, Status};

/// The RAM of the smallest guest that has a use for a disk.
const GUEST_MIN_BYTES: u64 = 1 << 20;
/// The rings of a few queues, which are charged too.
const RINGS_BYTES: u64 = 1 << 20;
/// Files that a server has open in addition to those of its workers: the disk twice, two sockets, eventfds, and files
/// that it opens briefly.
const SERVER_FILES: u64 = 12;
/// Files of a front-end with one queue: its connection, eight regions of memory, three eventfds, the in-flight region,
/// the dirty log and a back-end channel.
const FRONT_END_FILES: u64 = 16;

/// All checks of memory and open files.
pub(super) fn checks(facts: &Facts) -> [Check; 3] {
    [open_files(facts), memlock(facts), huge_pages(facts)]
}

/// Whether a guest's memory can be pinned at all.
pub(super) fn can_pin(facts: &Facts) -> bool {
    facts.memlock.check(GUEST_MIN_BYTES + rings_bytes(facts)).is_ok()
}

/// The rings of guests and of the server's workers.
fn rings_bytes(facts: &Facts) -> u64 {
    RINGS_BYTES + facts.server.engine.ring_bytes()
}

fn open_files(facts: &Facts) -> Check {
    let check = |detail: String| Check::ok("open-files", "open files", detail).needed_for(&ModeName::KERNEL_EXECUTED);
    // Without /proc nothing can be served; another check reports that.
    let Some(files) = &facts.open_files else { return check("unknown".to_owned()).with_status(Status::NotTried) };
    let detail = format!("{} may be open (RLIMIT_NOFILE), {} are open", files.limit, files.open);
    match files.check(SERVER_FILES + FRONT_END_FILES + facts.server.engine.files()) {
        Ok(()) => check(detail),
        Err(error) => check(detail).missing(error.why(), vec![error.change()]),
    }
}

fn memlock(facts: &Facts) -> Check {
    let memlock = &facts.memlock;
    let check =
        |detail: String| Check::ok("memlock", "memory that may be pinned", detail).needed_for(&ModeName::DIRECT);
    if memlock.exempt {
        return check("unlimited for this process (CAP_IPC_LOCK)".to_owned());
    }
    let Some(soft_bytes) = memlock.soft_bytes else {
        return check("unlimited (RLIMIT_MEMLOCK)".to_owned());
    };
    let pinned_bytes = memlock.pinned_bytes();
    let mut detail = format!(
        "{} left of {} (RLIMIT_MEMLOCK), for all of a guest's RAM, about {} for its rings and {} for the \
         rings of the workers",
        bytes(soft_bytes.saturating_sub(pinned_bytes)),
        bytes(soft_bytes),
        bytes(RINGS_BYTES),
        bytes(facts.server.engine.ring_bytes())
    );
    if !memlock.pinned_by.is_empty() {
        let processes: Vec<String> = memlock
            .pinned_by
            .iter()
            .map(|process| format!("{}[{}] {}", process.comm, process.pid, bytes(process.pinned_bytes)))
            .collect();
        detail += &format!("; pinned by this user: {}", processes.join(", "));
    }
    match memlock.check(GUEST_MIN_BYTES + rings_bytes(facts)) {
        Ok(()) => check(detail),
        Err(error) => check(detail).missing(
            format!("not even a guest with {} of RAM can be pinned: {error}", bytes(GUEST_MIN_BYTES)),
            vec!["raise RLIMIT_MEMLOCK to the guest's RAM and 2 MiB, or give the broker CAP_IPC_LOCK".to_owned()],
        ),
    }
}

fn huge_pages(facts: &Facts) -> Check {
    let check = |detail: String| Check::ok("huge-pages", "huge pages", detail).with_status(Status::Information);
    let Some(pools) = &facts.huge_pages else {
        return check("/sys does not tell: it is not mounted, or this kernel has none".to_owned());
    };
    if pools.iter().all(|pool| pool.total == 0) {
        let sizes: Vec<String> = pools.iter().map(|pool| bytes(pool.page_bytes)).collect();
        let known = if sizes.is_empty() {
            "this kernel has none".to_owned()
        } else {
            format!("none reserved ({})", sizes.join(", "))
        };
        return check(format!(
            "{known}; guest RAM on huge pages is pinned in a hundredth of the time and without bookkeeping memory: \
             sysctl vm.nr_hugepages=N reserves some"
        ));
    }
    let pools: Vec<String> = pools.iter().map(pool).collect();
    check(pools.join("; "))
}

fn pool(&HugePagePool { page_bytes, total, free }: &HugePagePool) -> String {
    format!("{}: {free} free of {total}", bytes(page_bytes))
}

/// What to know about the memory of a direct ring, if this process has a limit.
pub(super) fn note(facts: &Facts) -> Option<String> {
    let memlock = &facts.memlock;
    let soft_bytes = memlock.soft_bytes.filter(|_| !memlock.exempt)?;
    let works = facts.setup == Outcome::Works;
    works.then(|| {
        let left_bytes = soft_bytes.saturating_sub(memlock.pinned_bytes()).saturating_sub(rings_bytes(facts));
        format!("for guests of up to {} of RAM with this RLIMIT_MEMLOCK", bytes(left_bytes))
    })
}

/// The size in the largest unit that keeps the number whole, or in MiB with one decimal.
pub(super) fn bytes(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|&&(unit, _)| bytes >= unit && bytes % unit == 0) {
        Some((unit, name)) if bytes / unit < 10_000 => format!("{} {name}", bytes / unit),
        _ if bytes >= 1 << 20 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short_and_honest() {
        for (size_bytes, text) in [
            (0, "0 bytes"),
            (4096, "4 KiB"),
            (8 << 20, "8 MiB"),
            (1 << 30, "1 GiB"),
            ((8 << 20) - 512, "8.0 MiB"),
            ((8 << 20) - (1 << 19), "7680 KiB"),
            (4097, "4097 bytes"),
        ] {
            assert_eq!(bytes(size_bytes), text);
        }
    }
}
