//! How much memory may be pinned, and huge pages.

use super::{Check, Facts, HugePagePool, ModeName, Outcome, Status};
use crate::limits::Memlock;

/// A guest with less RAM than this has no use for a disk.
const GUEST_MIN_BYTES: u64 = 1 << 20;
/// For the rings of a few queues, which are charged too.
const RINGS_BYTES: u64 = 1 << 20;

/// Everything about memory.
pub(super) fn checks(facts: &Facts) -> [Check; 2] {
    [memlock(&facts.memlock), huge_pages(facts)]
}

fn memlock(memlock: &Memlock) -> Check {
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
        "{} left of {} (RLIMIT_MEMLOCK), for all of a guest's RAM and about {} for its rings",
        bytes(soft_bytes.saturating_sub(pinned_bytes)),
        bytes(soft_bytes),
        bytes(RINGS_BYTES)
    );
    if !memlock.pinned_by.is_empty() {
        let processes: Vec<String> = memlock
            .pinned_by
            .iter()
            .map(|process| format!("{}[{}] {}", process.comm, process.pid, bytes(process.pinned_bytes)))
            .collect();
        detail += &format!("; pinned by this user: {}", processes.join(", "));
    }
    match memlock.check(GUEST_MIN_BYTES + RINGS_BYTES) {
        Ok(()) => check(detail),
        Err(error) => check(detail).missing(
            format!("not even a guest with {} of RAM can be pinned: {error}", bytes(GUEST_MIN_BYTES)),
            vec!["raise RLIMIT_MEMLOCK to the guest's RAM and 1 MiB, or give the broker CAP_IPC_LOCK".to_owned()],
        ),
    }
}

fn huge_pages(facts: &Facts) -> Check {
    let pools = &facts.huge_pages;
    let check = |detail: String| Check::ok("huge-pages", "huge pages", detail).with_status(Status::Information);
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

/// What to know of a direct ring's memory, as far as this process is limited.
pub(super) fn note(facts: &Facts) -> Option<String> {
    let memlock = &facts.memlock;
    let soft_bytes = memlock.soft_bytes.filter(|_| !memlock.exempt)?;
    let works = facts.setup == Outcome::Works;
    works.then(|| {
        let left_bytes = soft_bytes.saturating_sub(memlock.pinned_bytes()).saturating_sub(RINGS_BYTES);
        format!("for guests of up to {} of RAM with this RLIMIT_MEMLOCK", bytes(left_bytes))
    })
}

/// In the largest unit that keeps the number whole, or in MiB with one decimal.
fn bytes(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|&&(unit, _)| bytes >= unit && bytes.is_multiple_of(unit)) {
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
