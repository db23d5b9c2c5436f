//! Messages about a disk on which a guest with a ring could make the end of the ring take as long as it likes.

use ringpass_broker::disk::LocatedDisk;

/// Why guests do not get rings on such a disk, unless `--mode direct` demands them.
pub(super) fn why_no_rings(disk: &LocatedDisk, is_demanded: bool) -> Option<String> {
    if !disk.chains_writes() {
        return None;
    }
    let why = why(disk);
    if is_demanded {
        tracing::warn!("--mode direct: {why}");
        return None;
    }
    Some(format!("{why} (--mode direct overrules this)"))
}

fn why(disk: &LocatedDisk) -> String {
    let (how, remedy) = if disk.is_direct_io() {
        ("by direct I/O on a file system that takes writes one after the other", "put the image on ext4 or XFS")
    } else {
        ("through the page cache", "use direct I/O (--direct-io on)")
    };
    format!(
        "the kernel executes a ring's writes to {:?} {how}, as a chain that it does not cancel: a guest that has many writes \
         outstanding could keep its VMM waiting for the end of its ring. {remedy}, or a block device",
        disk.path()
    )
}
