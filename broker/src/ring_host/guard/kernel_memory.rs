//! The memory of the kernel.

use std::fs;

/// Kernel memory of the whole host that cannot be reclaimed, in bytes: `SUnreclaim` of `/proc/meminfo`
/// (`proc_meminfo(5)`). The requests of io_uring and of the block layer are in it. `None`: the host does not tell.
pub(super) fn unreclaimable_bytes() -> Option<u64> {
    parse(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse(meminfo: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix("SUnreclaim:"))?;
    rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_among_others() {
        assert_eq!(
            parse("Slab:  100 kB\nSReclaimable:  60 kB\nSUnreclaim:       40 kB\nKernelStack: 1 kB\n"),
            Some(40960)
        );
        assert_eq!(parse("Slab:  100 kB\n"), None);
        assert_eq!(parse("SUnreclaim: many kB\n"), None);
    }

    #[test]
    fn this_host_has_some() {
        assert!(unreclaimable_bytes().unwrap() > 0);
    }
}
