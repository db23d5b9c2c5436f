//! Malformed requests that the device answers with a status.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    disks::DiskKind,
    front_end::{
        blk::{SECTOR_BYTES, range},
        descriptor::{Descriptor, F_WRITE},
        rig::Rig,
    },
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::bench::{Bench, DISK_BYTES, NOWHERE_GPA, REGION_BYTES, SECTORS};

/// A request: its header, the descriptors between header and status, and the expected status.
struct Case {
    name: &'static str,
    kind: u32,
    sector: u64,
    data: Vec<Descriptor>,
    status: u32,
}

pub(crate) fn every_kind(bench: &mut Bench) -> Result<()> {
    let data = bench.hostile.data_gpa();
    let region_end = REGION_BYTES;
    let readable = |gpa, len| vec![Descriptor::readable(gpa, len)];
    let writable = |gpa, len| vec![Descriptor::writable(gpa, len)];
    let case = |name, kind, sector, data, status| Case { name, kind, sector, data, status };
    // The address of the ranges of discards and write zeroes.
    let ranges = bench.table_gpa;
    let ranges_at = |index: u64| ranges + 16 * index;
    let contents = [
        range(0, 8, 0),
        range(0, 8, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
        range(0, 8, 0x8000_0000),
        range(SECTORS - 1, 8, 0),
        range(u64::MAX - 3, 8, 0),
        range(0, u32::MAX, 0),
    ];
    for (index, content) in (0u64..).zip(&contents) {
        bench.put(ranges_at(index), content)?;
    }
    let (ok, ioerr, unsupp) = (VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP);
    let (read, write) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT);
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    let cases = [
        case("a read", read, 0, writable(data, 4096), ok),
        case("a read into no RAM", read, 0, writable(NOWHERE_GPA, 4096), ioerr),
        case("a read past the end of RAM", read, 0, writable(region_end - 512, 4096), ioerr),
        case("a read past the last address", read, 0, writable(u64::MAX - 100, 4096), ioerr),
        case("a write from no RAM", write, 0, readable(NOWHERE_GPA, 4096), ioerr),
        case("a read of half a sector", read, 0, writable(data, 256), ioerr),
        case("a write of a sector and a byte", write, 0, readable(data, 513), ioerr),
        case("a read of readable memory", read, 0, readable(data, 4096), ioerr),
        case("a write of writable memory", write, 0, writable(data, 4096), ioerr),
        case("a read of the last sector", read, SECTORS - 8, writable(data, 4096), ok),
        case("a read past the disk", read, SECTORS - 7, writable(data, 4096), ioerr),
        case("a write past the disk", write, SECTORS, readable(data, 512), ioerr),
        case("a read at the last sector number", read, u64::MAX, writable(data, 512), ioerr),
        case("a write at the last offset", write, u64::MAX / SECTOR_BYTES, readable(data, 512), ioerr),
        case("a read of almost 4 GiB", read, 0, writable(data, !511), ioerr),
        case("an unknown type", 99, 0, writable(data, 512), unsupp),
        case("the largest type", u32::MAX, 0, vec![], unsupp),
        case("readable memory after writable", read, 0, [writable(data, 512), readable(data, 512)].concat(), ioerr),
        case("a flush", VIRTIO_BLK_T_FLUSH, 0, vec![], ok),
        case("an id", VIRTIO_BLK_T_GET_ID, 0, writable(data, 20), ok),
        case("an id with too little room", VIRTIO_BLK_T_GET_ID, 0, writable(data, 19), ioerr),
        case("a discard", discard, 0, readable(ranges_at(0), 16), ok),
        case("a discard with unmap", discard, 0, readable(ranges_at(1), 16), unsupp),
        case("a discard with an unknown flag", discard, 0, readable(ranges_at(2), 16), unsupp),
        case("write zeroes with unmap", zeroes, 0, readable(ranges_at(1), 16), ok),
        case("write zeroes with an unknown flag", zeroes, 0, readable(ranges_at(2), 16), unsupp),
        case("a discard past the disk", discard, 0, readable(ranges_at(3), 16), ioerr),
        case("write zeroes past the last sector", zeroes, 0, readable(ranges_at(4), 16), ioerr),
        case("write zeroes of 2 TiB", zeroes, 0, readable(ranges_at(5), 16), ioerr),
        case("a discard without a range", discard, 0, vec![], ioerr),
        case("a discard of half a range", discard, 0, readable(ranges_at(0), 8), ioerr),
        case("a discard from no RAM", discard, 0, readable(NOWHERE_GPA, 16), ioerr),
    ];
    for Case { name, kind, sector, data, status } in cases {
        let answer = bench.hostile.request(kind, sector, &data).with_context(|| name.to_owned())?;
        ensure!(u32::from(answer.status) == status, "{name}: {answer:?} instead of status {status}");
        // A failed request has written no data, and the length counts the status only if all bytes before it were
        // written (VIRTIO 1.2, 2.7.8.2).
        let room_bytes: u64 =
            data.iter().filter(|buffer| buffer.flags & F_WRITE != 0).map(|buffer| u64::from(buffer.len_bytes)).sum();
        let used_bytes = if status == ok || room_bytes == 0 { room_bytes + 1 } else { 0 };
        ensure!(u64::from(answer.len_bytes) == used_bytes, "{name}: {answer:?} instead of {used_bytes} bytes");
    }
    let header_gpa = bench.hostile.header_gpa();
    for (name, header) in [
        ("a header of 15 bytes", Descriptor::readable(header_gpa, 15)),
        ("a header in no RAM", Descriptor::readable(NOWHERE_GPA, 16)),
        ("a header past the end of RAM", Descriptor::readable(region_end - 8, 16)),
    ] {
        bench.hostile.put_header(read, 0)?;
        let chain = [header, Descriptor::writable(data, 512), bench.hostile.put_status()?];
        bench.hostile.send(&chain).with_context(|| name.to_owned())?;
        let status = bench.hostile.status()?;
        ensure!(u32::from(status) == ioerr, "{name}: status {status}");
    }
    ensure!(!bench.error.wait(Duration::ZERO)?, "the queue has stopped");
    bench.check_honest()
}

/// Both errors are refused requests. With one rate limit for all of them, the log would show the second error only
/// after ten seconds.
pub(crate) fn flood() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "2"])?;
    let result = Bench::new(&rig).and_then(|mut bench| {
        let data = bench.hostile.data_gpa();
        for len_bytes in (1..200).chain(1..200) {
            bench.hostile.request(VIRTIO_BLK_T_IN, 0, &[Descriptor::writable(data, len_bytes)])?;
        }
        bench.hostile.request(VIRTIO_BLK_T_IN, SECTORS, &[Descriptor::writable(data, 512)])?;
        broker.wait_for_log("end beyond the capacity of the disk")?;
        let lines = broker.log().lines().filter(|line| line.contains("cannot have")).count();
        // The broker logs one line in ten seconds.
        ensure!(lines < 20, "{lines} lines for a flood of one error");
        Ok(())
    });
    broker.explain(result)
}
