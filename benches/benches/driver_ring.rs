//! The cost of the driver's side of a ring per request: push, publish and reap over plain memory, with a device that

#![allow(missing_docs, reason = "criterion_group! makes a public function")]
//! answers at once. For comparison: a 4 KiB read from the page cache takes about 1 µs.

use std::cell::UnsafeCell;
use std::hint::black_box;
use std::ptr::NonNull;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringpass_guest_abi::{Doorbell, DriverRing, FixedAddressing, MappedRing, RingLayout, RingMemory, Sqe};

const ENTRIES: u32 = 256;
const ADDRESSING: FixedAddressing = match FixedAddressing::new(1 << 44, 22) {
    Ok(addressing) => addressing,
    Err(_) => panic!("both are in range"),
};

/// Memory of a ring, aligned as the ABI demands.
#[repr(align(4096))]
struct Area<const BYTES: usize>(UnsafeCell<[u8; BYTES]>);

impl<const BYTES: usize> Area<BYTES> {
    fn new() -> Box<Self> {
        Box::new(Self(UnsafeCell::new([0; BYTES])))
    }

    fn start(&self) -> NonNull<u8> {
        NonNull::new(self.0.get().cast()).expect("a box is not at address 0")
    }
}

const RINGS_BYTES: usize = 64 * 1024;
const SQES_BYTES: usize = 64 * 1024;

fn layout() -> RingLayout {
    RingLayout {
        sq_entries: ENTRIES,
        cq_entries: 2 * ENTRIES,
        sq_head_offset: 0,
        sq_tail_offset: 64,
        sq_flags_offset: 128,
        cq_head_offset: 192,
        cq_tail_offset: 256,
        cq_flags_offset: 320,
        cqes_offset: 384,
        rings_bytes: RINGS_BYTES as u64,
        sqes_bytes: SQES_BYTES as u64,
        doorbell: Doorbell::WhenAsleep,
    }
}

fn mapped(rings: &Area<RINGS_BYTES>, sqes: &Area<SQES_BYTES>) -> MappedRing {
    // SAFETY: both boxes outlive the benchmark that uses the value, are aligned to 4096 bytes, and are only accessed
    // through raw pointers.
    unsafe { MappedRing::new(rings.start(), RINGS_BYTES as u64, sqes.start(), SQES_BYTES as u64) }
}

fn round_trip(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("driver_ring");
    for batch in [1, 32] {
        let (rings, sqes) = (Area::new(), Area::new());
        let device = mapped(&rings, &sqes);
        let layout = layout();
        let mut ring = DriverRing::new(mapped(&rings, &sqes), layout).expect("the layout is valid");
        let mut served = 0u32;
        group.throughput(Throughput::Elements(batch));
        group.bench_function(format!("push, publish and reap {batch}"), |bencher| {
            bencher.iter(|| {
                for block in 0..batch {
                    let address = ADDRESSING.resolve(black_box(block * 4096), 4096).expect("inside a slot");
                    ring.push(&Sqe::read_fixed(address, 4096, block * 4096, block)).expect("there is room");
                }
                assert!(!ring.publish(), "the device never sleeps");
                // The device completes everything at once.
                served = served.wrapping_add(batch as u32);
                device.store_release(layout.sq_head_offset, served);
                device.store_release(layout.cq_tail_offset, served);
                while let Some(cqe) = ring.reap() {
                    black_box(cqe);
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, round_trip);
criterion_main!(benches);
