//! Chains that the device cannot answer.

use anyhow::{Context, Result, ensure};
use ringpass_tests::front_end::descriptor::{Descriptor, F_INDIRECT, F_NEXT};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use crate::bench::{Bench, NOWHERE_GPA, Outcome};

const QUEUE_SIZE: u16 = 128;

/// Writes a chain that the device cannot answer, and makes it available.
type Stop = fn(&mut Bench) -> Result<()>;

pub(crate) fn every_kind(bench: &mut Bench) -> Result<()> {
    let cases: [(&str, Stop); 16] = [
        ("a loop", |bench| chain(bench, &[(0, F_NEXT, 1), (0, F_NEXT, 0)])),
        ("a descriptor that follows itself", |bench| chain(bench, &[(0, F_NEXT, 0)])),
        ("a next descriptor past the table", |bench| chain(bench, &[(0, F_NEXT, QUEUE_SIZE)])),
        ("no writable byte", |bench| chain(bench, &[(0, 0, 0)])),
        ("a status in no RAM", |bench| table_of(bench, |_, _| Descriptor::writable(NOWHERE_GPA, 1))),
        ("more than 4 GiB", |bench| table_of(bench, |_, gpa| Descriptor::writable(gpa, u32::MAX))),
        ("a head past the table", |bench| head(bench, QUEUE_SIZE)),
        ("the largest head", |bench| head(bench, u16::MAX)),
        ("an index far ahead", |bench| {
            let vring = bench.hostile.vring();
            let index = vring.next_avail().wrapping_add(QUEUE_SIZE + 1);
            vring.write_avail_idx(index)?;
            vring.kick()
        }),
        ("an indirect table in no RAM", |bench| indirect(bench, NOWHERE_GPA, 32, 0)),
        ("an empty indirect table", |bench| indirect(bench, bench.table_gpa, 0, 0)),
        ("an indirect table of 24 bytes", |bench| indirect(bench, bench.table_gpa, 24, 0)),
        ("an indirect table with a next descriptor", |bench| indirect(bench, bench.table_gpa, 32, F_NEXT)),
        ("an indirect table of 4 GiB", |bench| indirect(bench, bench.table_gpa, !15, 0)),
        ("an indirect table in an indirect table", |bench| {
            let inner = Descriptor { flags: F_INDIRECT, ..Descriptor::readable(bench.table_gpa, 16) };
            bench.put(bench.table_gpa, &inner.to_bytes())?;
            indirect(bench, bench.table_gpa, 16, 0)
        }),
        ("a loop in an indirect table", |bench| {
            let looped = Descriptor { flags: F_NEXT, next: 0, ..Descriptor::readable(bench.hostile.header_gpa(), 16) };
            bench.put(bench.table_gpa, &looped.to_bytes())?;
            indirect(bench, bench.table_gpa, 16, 0)
        }),
    ];
    for (name, send) in cases {
        bench.hostile.put_header(VIRTIO_BLK_T_IN, 0)?;
        send(bench).with_context(|| name.to_owned())?;
        let outcome = bench.outcome().with_context(|| name.to_owned())?;
        ensure!(outcome == Outcome::Stopped, "{name}: {outcome:?}");
        bench.check_honest().with_context(|| format!("the other queue after {name}"))?;
        bench.restart().with_context(|| format!("cannot start the queue after {name}"))?;
        bench.hostile.read(0, 4096).with_context(|| format!("the queue after {name}"))?;
    }
    Ok(())
}

/// Writes descriptors over the header from index 0 on, each with an offset, flags and a next descriptor.
fn chain(bench: &mut Bench, descriptors: &[(u64, u16, u16)]) -> Result<()> {
    let gpa = bench.hostile.header_gpa();
    for (index, &(offset, flags, next)) in (0u16..).zip(descriptors) {
        let descriptor = Descriptor { gpa: gpa + offset, len_bytes: 16, flags, next };
        bench.hostile.vring().write_descriptor(index, descriptor)?;
    }
    head(bench, 0)
}

/// Writes a chain of the header and the descriptor that `last` makes.
fn table_of(bench: &mut Bench, last: fn(&Bench, u64) -> Descriptor) -> Result<()> {
    let gpa = bench.hostile.header_gpa();
    let status = last(bench, gpa);
    let vring = bench.hostile.vring();
    vring.write_descriptor(0, Descriptor { flags: F_NEXT, next: 1, ..Descriptor::readable(gpa, 16) })?;
    vring.write_descriptor(1, status)?;
    head(bench, 0)
}

fn indirect(bench: &mut Bench, gpa: u64, len_bytes: u32, more_flags: u16) -> Result<()> {
    let table = Descriptor { flags: F_INDIRECT | more_flags, ..Descriptor::readable(gpa, len_bytes) };
    bench.hostile.vring().write_descriptor(0, table)?;
    head(bench, 0)
}

fn head(bench: &mut Bench, head: u16) -> Result<()> {
    let vring = bench.hostile.vring();
    vring.add_head(head)?;
    vring.publish_quietly()?;
    vring.kick()
}
