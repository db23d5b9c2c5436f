//! Messages about a disk whose guest has smaller blocks than direct I/O supports.

use ringpass_broker::disk::{DirectAlignment, LocatedDisk};

/// Warns the operator at the start what unaligned requests cost, and how to avoid the cost.
pub(super) fn warn(disk: &LocatedDisk) {
    if let (Some(block_bytes), Some(direct)) = (disk.finer_than_direct_io(), disk.direct_alignment()) {
        let cost = cost(disk.is_read_only(), disk.logical_block_bytes(), block_bytes);
        tracing::warn!(disk = ?disk.path(), "slow small requests: {cost}. {}", remedy(&direct, block_bytes));
    }
}

/// Why guests cannot have rings on such a disk.
pub(super) fn why_no_rings(disk: &LocatedDisk) -> Option<String> {
    let (block_bytes, direct) = (disk.finer_than_direct_io()?, disk.direct_alignment()?);
    Some(format!(
        "the guest has blocks of {} bytes, and direct I/O on {:?} takes {block_bytes}: the kernel executes the requests of a \
         ring unchanged. {}",
        disk.logical_block_bytes(),
        disk.path(),
        remedy(&direct, block_bytes)
    ))
}

fn cost(read_only: bool, logical_block_bytes: u32, block_bytes: u32) -> String {
    let each = if read_only {
        format!("a smaller read costs a read of {block_bytes} bytes and a copy")
    } else {
        format!(
            "a smaller write costs a read and a write of {block_bytes} bytes, during which other writes to the same \
             {block_bytes} bytes wait (`ringpass dev stats` counts these writes)"
        )
    };
    format!(
        "the guest has blocks of {logical_block_bytes} bytes, and the file system takes direct I/O in units of {block_bytes} \
         bytes: {each}"
    )
}

fn remedy(direct: &DirectAlignment, block_bytes: u32) -> String {
    // On XFS this means that the file shares extents with another file.
    let unshare = if direct.read_block_bytes < direct.write_block_bytes {
        "copy the image without sharing its blocks (`cp --reflink=never`), "
    } else {
        ""
    };
    format!(
        "If no data on the disk was written in smaller blocks, give --logical-block-size {block_bytes}; otherwise {unshare}use \
         the page cache (--direct-io off), or accept the cost"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_messages_state_the_cost_and_the_remedy_with_sizes() {
        assert_eq!(
            cost(false, 512, 4096),
            "the guest has blocks of 512 bytes, and the file system takes direct I/O in units of 4096 bytes: a smaller \
             write costs a read and a write of 4096 bytes, during which other writes to the same 4096 bytes wait (`ringpass \
             dev stats` counts these writes)"
        );
        assert!(cost(true, 512, 4096).ends_with("a smaller read costs a read of 4096 bytes and a copy"));
        let direct =
            |read_block_bytes| DirectAlignment { read_block_bytes, write_block_bytes: 4096, memory_bytes: 512 };
        assert_eq!(
            remedy(&direct(4096), 4096),
            "If no data on the disk was written in smaller blocks, give --logical-block-size 4096; otherwise use the page \
             cache (--direct-io off), or accept the cost"
        );
        assert!(
            remedy(&direct(512), 4096).contains("otherwise copy the image without sharing its blocks (`cp --reflink=")
        );
    }
}
