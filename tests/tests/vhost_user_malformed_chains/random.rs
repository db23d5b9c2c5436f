//! Random chains.

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    front_end::{
        blk::header,
        descriptor::{Descriptor, F_INDIRECT, F_NEXT, F_WRITE},
    },
    harness,
    seed::Seed,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::bench::{Bench, DATA_BYTES, NOWHERE_GPA, Outcome, SECTORS};

pub(crate) fn chains(bench: &mut Bench) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let (mut answered, mut stopped) = (0, 0);
    for round in 0..harness::budget(5_000u64, 500_000) {
        let mut rng = seed.derive(round).rng();
        random_table(bench, &mut rng)?;
        bench.hostile.put_status()?;
        let head = if rng.u8(0..50) == 0 { rng.u16(..) } else { rng.u16(0..8) };
        match bench.send_raw(head).with_context(|| format!("round {round}"))? {
            Outcome::Answered(_) => answered += 1,
            Outcome::Stopped => {
                stopped += 1;
                bench.restart().with_context(|| format!("after round {round}"))?;
            }
        }
        if round % 200 == 0 {
            bench.check_honest().with_context(|| format!("after round {round}"))?;
            bench.check_canaries().with_context(|| format!("after round {round}"))?;
        }
    }
    // Both must happen often, or the chains are not as random as they should be.
    ensure!(answered > 100 && stopped > 100, "{answered} answered, {stopped} stopped");
    Ok(())
}

/// Writes eight descriptors, and eight of an indirect table. Each is sometimes a little wrong. Only the driver's own
/// data is writable: descriptors of the canary behind it are always readable.
fn random_table(bench: &mut Bench, rng: &mut fastrand::Rng) -> Result<()> {
    let kinds =
        [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES];
    let kind = if rng.u8(0..10) == 0 { rng.u32(..) } else { kinds[rng.usize(..kinds.len())] };
    let sector = if rng.u8(0..10) == 0 { rng.u64(..) } else { rng.u64(0..SECTORS - 8) };
    bench.put(bench.hostile.header_gpa(), &header(kind, sector))?;
    for index in 0..8 {
        let descriptor = random_descriptor(bench, rng, index, 8);
        bench.hostile.vring().write_descriptor(index, descriptor)?;
        let mut inner = random_descriptor(bench, rng, index, 8);
        if rng.u8(0..20) > 0 {
            inner.flags &= !F_INDIRECT;
        }
        bench.put(bench.table_gpa + 16 * u64::from(index), &inner.to_bytes())?;
    }
    Ok(())
}

fn random_descriptor(bench: &Bench, rng: &mut fastrand::Rng, index: u16, count: u16) -> Descriptor {
    let position = rng.u8(0..100);
    let next = if rng.u8(0..20) == 0 { rng.u16(0..count + 2) } else { index + 1 };
    let (mut gpa, mut len_bytes, mut flags) = match position {
        0..30 => (bench.hostile.header_gpa(), 16, 0),
        30..45 => (bench.canary_gpa, 512 * rng.u32(0..8), 0),
        45..70 => (bench.hostile.data_gpa(), 512 * rng.u32(0..8), F_WRITE),
        70..90 => (bench.hostile.status_gpa(), 1, F_WRITE),
        90..98 => (bench.table_gpa, 16 * rng.u32(0..9), F_INDIRECT),
        _ => (NOWHERE_GPA, 4096, F_WRITE * rng.u16(0..2)),
    };
    if flags & F_INDIRECT == 0 && rng.u8(0..100) < 70 {
        flags |= F_NEXT;
    }
    if rng.u8(0..40) == 0 {
        flags ^= F_NEXT;
    }
    // No length lets the device write the canary.
    if rng.u8(0..40) == 0 {
        len_bytes = if flags & F_WRITE == 0 { rng.u32(..) } else { rng.u32(0..DATA_BYTES / 2) };
    }
    if rng.u8(0..60) == 0 && flags & F_WRITE == 0 {
        gpa = rng.u64(..);
    }
    if flags & F_WRITE != 0 && gpa == bench.hostile.status_gpa() {
        len_bytes = 1;
    }
    Descriptor { gpa, len_bytes, flags, next }
}
