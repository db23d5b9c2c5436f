//! What the guest reads.

use std::fmt;

use anyhow::{Context, Result};
use ringpass_tests::linux_guest::LinuxGuest;

/// Reads at random places of the disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    pub(crate) block_kib: u32,
    pub(crate) depth: u32,
    /// No two pages of a buffer are neighbours in the guest's memory.
    pub(crate) is_fragmented: bool,
}

pub(crate) const WORKLOADS: &[Workload] = &[
    Workload { block_kib: 4, depth: 1, is_fragmented: false },
    Workload { block_kib: 4, depth: 32, is_fragmented: false },
    Workload { block_kib: 128, depth: 1, is_fragmented: false },
    Workload { block_kib: 128, depth: 1, is_fragmented: true },
    Workload { block_kib: 128, depth: 32, is_fragmented: true },
];

/// Makes a file on a RAM disk, whose pages fio takes as buffers. Every second page belongs to another file.
const FRAGMENTS: &str = "
    if [ ! -e /tmp/fragments/a ]; then
        mkdir -p /tmp/fragments
        mount -t tmpfs -o huge=never none /tmp/fragments
        page=0
        while [ $page -lt 1024 ]; do
            dd if=/dev/zero bs=4096 count=1 >>/tmp/fragments/a 2>/dev/null
            dd if=/dev/zero bs=4096 count=1 >>/tmp/fragments/b 2>/dev/null
            page=$((page + 1))
        done
    fi";

impl Workload {
    /// A script that reads so often.
    pub(crate) fn script(&self, reads: u32) -> String {
        let Self { block_kib, depth, is_fragmented } = self;
        let (prepare, memory) =
            if *is_fragmented { (FRAGMENTS, "mmapshared:/tmp/fragments/a") } else { ("", "malloc") };
        let kib = reads * block_kib;
        format!(
            "set -e
            {prepare}
            fio --name=count --ioengine=io_uring --filename=/dev/vda --direct=1 --rw=randread --bs={block_kib}k \
             --iodepth={depth} --io_size={kib}k --norandommap=1 --mem={memory} \
             --output-format=terse >/dev/null"
        )
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fragmented = if self.is_fragmented { ", fragmented" } else { "" };
        write!(f, "{} KiB, depth {}{fragmented}", self.block_kib, self.depth)
    }
}

/// The number of interrupts of the disk's queues.
pub(crate) fn interrupts(guest: &mut LinuxGuest) -> Result<u64> {
    let lines = guest.run("grep virtio /proc/interrupts | awk '{ sum += $2 } END { print sum + 0 }'")?;
    lines.trim().parse().context("a number of interrupts")
}
