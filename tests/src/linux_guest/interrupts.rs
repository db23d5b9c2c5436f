//! The interrupts of a guest, as its kernel counts them.

use anyhow::{Context, Result};

use super::LinuxGuest;

/// The names of a device's interrupts and how often each has come, on all CPUs together.
///
/// The device is `virtio0`, `virtio1`, … A virtqueue with a vector of its own has a name like `virtio0-req.1`, virtqueues
/// that share one have `virtio0-virtqueues`, and a device without vectors has `virtio0`.
///
/// # Errors
///
/// The script fails.
pub fn of(guest: &mut LinuxGuest, device: &str) -> Result<Vec<(String, u64)>> {
    let script = format!(
        "awk '/{device}([-,]|$)/ {{
            n = 0
            for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i
            print n, $NF
        }}' /proc/interrupts"
    );
    let lines = guest.run(&script)?;
    let parse = |line: &str| {
        let (count, name) = line.split_once(' ').context("a count and a name")?;
        Ok((name.to_owned(), count.parse().with_context(|| line.to_owned())?))
    };
    lines.lines().map(parse).collect()
}

/// All interrupts of a device together.
///
/// # Errors
///
/// The script fails.
pub fn sum(guest: &mut LinuxGuest, device: &str) -> Result<u64> {
    Ok(of(guest, device)?.into_iter().map(|(_, count)| count).sum())
}
