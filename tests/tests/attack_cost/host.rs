//! What an attack takes from the host.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

/// The most kernel memory that one hostile ring may take. Less than the memory that a guest has anyway.
pub(crate) const MEMORY_MAX_BYTES: u64 = 64 << 20;

/// Runs `work`, and returns what it returns and by how much the kernel's memory grew at most meanwhile. (`SUnreclaim`:
/// the requests of io_uring and of the block layer are in it. The free memory also changes with every file that any
/// process reads or writes.)
pub(crate) fn with_kernel_memory_watched<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<(T, u64)> {
    let before = settled_bytes()?;
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let result = work();
            is_over.store(true, Ordering::Relaxed);
            result
        });
        let mut most = before;
        while !is_over.load(Ordering::Relaxed) && !worker.is_finished() {
            most = most.max(unreclaimable_bytes()?);
            thread::sleep(Duration::from_millis(5));
        }
        let result = worker.join().map_err(|_| anyhow::anyhow!("the attack panicked"))??;
        Ok((result, most - before))
    })
}

/// Fails if an attack took more kernel memory than it may.
pub(crate) fn check_kernel_memory(grown_bytes: u64) -> Result<()> {
    eprintln!("the kernel's memory grew by {:.1} MiB at most", grown_bytes as f64 / f64::from(1 << 20));
    ensure!(grown_bytes < MEMORY_MAX_BYTES, "the kernel's memory grew by {grown_bytes} bytes");
    Ok(())
}

/// The kernel's memory, once what earlier rings had is free.
fn settled_bytes() -> Result<u64> {
    let mut least = unreclaimable_bytes()?;
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(5));
        let now = unreclaimable_bytes()?;
        if now >= least {
            break;
        }
        least = now;
    }
    Ok(least)
}

fn unreclaimable_bytes() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let rest = text.lines().find_map(|line| line.strip_prefix("SUnreclaim:")).context("SUnreclaim")?;
    Ok(rest.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}
