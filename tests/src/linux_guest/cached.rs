//! Blocks of `/dev/vda` in the guest's page cache, to which only the device has written.
//!
//! The guest reads the blocks while it migrates, and looks at the pages afterwards. It finds each page that a migration
//! has missed, if the kernel's command line has `init_on_alloc=0`: otherwise the CPU writes to these pages too.

/// Writes the first 32 MiB of the disk, and leaves nothing of it in the page cache.
pub const FILL: &str = "set -e
    fio --name=cached --filename=/dev/vda --rw=write --bs=64k --size=32m --direct=1 --verify=crc32c \
        --do_verify=0 --output-format=terse >/dev/null
    echo 3 >/proc/sys/vm/drop_caches";
/// Reads the blocks into the page cache.
pub const READ: &str = "dd if=/dev/vda of=/dev/null bs=1M count=32 2>/dev/null";
/// Verifies the blocks in the page cache, and prints how many sectors it had to read from the disk.
pub const LOOK: &str = "before=$(awk '{print $3}' /sys/block/vda/stat)
    fio --name=cached --filename=/dev/vda --rw=read --bs=64k --size=32m --verify=crc32c --verify_only \
        --invalidate=0 --output-format=terse >/dev/null || exit
    after=$(awk '{print $3}' /sys/block/vda/stat)
    echo $((after - before)) sectors were read";
/// Keeps the disk open: the page cache of a block device goes with its last user.
pub const HOLD: &str = "sleep 1000 </dev/vda";
