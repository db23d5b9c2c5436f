//! The cost of parsing a virtio-blk request: the benchmark takes a 4 KiB read, as Linux sends it, from its queue,

#![allow(missing_docs, reason = "criterion_group! makes a public function")]
//! parses it and completes it, without any I/O.
//!
//! `take and give back` does the same without parsing, so the difference is the cost of the parser, including the walk
//! along the descriptors. For comparison: such a request takes about 1.5 µs from end to end.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringpass_broker::vhost_user::DeviceMemory;
use ringpass_broker::virtio_blk::{BlkConfig, BlkParameters, Parsed, RequestLimits, RequestTypes, SegmentList, parse};
use ringpass_broker::virtqueue::{DescriptorChain, QueueSetup, SplitQueue};
use ringpass_test_utils::blk::{HEADER_BYTES, header};
use ringpass_test_utils::descriptor::Descriptor;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use vm_memory::{Bytes, GuestAddress};

const QUEUE_SIZE: u16 = 256;
/// The number of chains; a power of two, so that it can fill the available ring once.
const CHAINS: u16 = 64;
const READ_BYTES: u32 = 4096;

const DESC_TABLE: u64 = 0;
const AVAIL_RING: u64 = 0x2000;
const USED_RING: u64 = 0x3000;
const FRAMES: u64 = 0x4000;
const INDIRECT: u64 = 0x8000;
const DATA: u64 = 1 << 20;

/// Memory in adjacent regions of equal size, as in a front-end with hotplugged memory.
fn memory(regions: u64) -> DeviceMemory {
    let region_bytes = (64 << 20) / regions;
    let ranges: Vec<_> = (0..regions).map(|n| (GuestAddress(n * region_bytes), region_bytes as usize)).collect();
    DeviceMemory::from_ranges(&ranges).expect("the regions are sorted and apart")
}

fn put(memory: &DeviceMemory, gpa: u64, bytes: &[u8]) {
    memory.write_slice(bytes, GuestAddress(gpa)).expect("the layout is inside memory");
}

/// Header, data and status of each chain at `table(chain)`, which is entry `first(chain)` of a descriptor table.
fn put_chains(memory: &DeviceMemory, table: impl Fn(u64) -> u64, first: impl Fn(u64) -> u16) {
    for chain in 0..u64::from(CHAINS) {
        let header_gpa = FRAMES + 32 * chain;
        put(memory, header_gpa, &header(VIRTIO_BLK_T_IN, 8 * chain));
        let first = first(chain);
        let descriptors = [
            Descriptor::readable(header_gpa, HEADER_BYTES).linked_to(first + 1),
            Descriptor::writable(DATA + 8192 * chain, READ_BYTES).linked_to(first + 2),
            Descriptor::writable(header_gpa + u64::from(HEADER_BYTES), 1),
        ];
        put(memory, table(chain), descriptors.map(Descriptor::to_bytes).as_flattened());
    }
}

/// A queue with [`CHAINS`] chains, which the driver can make available repeatedly.
struct Driver {
    memory: DeviceMemory,
    queue: SplitQueue,
    avail_idx: u16,
}

impl Driver {
    fn direct(regions: u64) -> Self {
        let driver = Self::new(regions, |chain| 3 * chain);
        put_chains(&driver.memory, |chain| DESC_TABLE + 48 * chain, |chain| 3 * chain as u16);
        driver
    }

    fn indirect(regions: u64) -> Self {
        let driver = Self::new(regions, |chain| chain);
        put_chains(&driver.memory, |chain| INDIRECT + 48 * chain, |_| 0);
        for chain in 0..u64::from(CHAINS) {
            let table = Descriptor::indirect(INDIRECT + 48 * chain, 48);
            put(&driver.memory, DESC_TABLE + 16 * chain, &table.to_bytes());
        }
        driver
    }

    fn new(regions: u64, head: impl Fn(u16) -> u16) -> Self {
        let memory = memory(regions);
        for slot in 0..QUEUE_SIZE {
            put(&memory, AVAIL_RING + 4 + 2 * u64::from(slot), &head(slot % CHAINS).to_le_bytes());
        }
        let setup = QueueSetup {
            size: QUEUE_SIZE,
            desc_table: GuestAddress(DESC_TABLE),
            avail_ring: GuestAddress(AVAIL_RING),
            used_ring: GuestAddress(USED_RING),
            next_avail: 0,
            driver_features: 0,
            used_log_gpa: None,
            inflight: None,
        };
        let queue = SplitQueue::new(setup, &memory).expect("the rings are in memory and aligned");
        Self { memory, queue, avail_idx: 0 }
    }

    /// Makes all chains available and serves them.
    fn round(&mut self, mut serve: impl FnMut(DescriptorChain<'_>) -> u32) {
        self.avail_idx = self.avail_idx.wrapping_add(CHAINS);
        put(&self.memory, AVAIL_RING + 2, &self.avail_idx.to_le_bytes());
        while let Some((head, chain)) = self.queue.pop_recorded(&self.memory).expect("the ring is in order") {
            let written_bytes = serve(chain);
            self.queue.complete(head, written_bytes, None).expect("the ring is in order");
        }
    }
}

fn limits() -> RequestLimits {
    let parameters = BlkParameters::new(1 << 30).physical_block_bytes(4096).queue_size(QUEUE_SIZE);
    BlkConfig::new(parameters).expect("the parameters are in their ranges").request_limits()
}

fn four_kib_reads(criterion: &mut Criterion) {
    let (limits, types) = (limits(), RequestTypes::negotiated(0));
    let mut group = criterion.benchmark_group("virtio_blk_parse");
    group.throughput(Throughput::Elements(CHAINS.into()));
    for (name, mut driver) in [
        ("direct", Driver::direct(1)),
        ("indirect", Driver::indirect(1)),
        ("direct, 64 regions", Driver::direct(64)),
        ("indirect, 64 regions", Driver::indirect(64)),
    ] {
        group.bench_function(format!("take and give back, {name}"), |bencher| {
            bencher.iter(|| {
                driver.round(|chain| {
                    black_box(chain);
                    READ_BYTES + 1
                });
            });
        });
        let mut segments = SegmentList::with_capacity(128);
        group.bench_function(format!("with parsing, {name}"), |bencher| {
            bencher.iter(|| {
                driver.round(|chain| {
                    let Parsed::Request(request) = black_box(parse(chain, &limits, types, &mut segments)) else {
                        panic!("the chains are requests")
                    };
                    black_box(segments.iovecs());
                    request.writable_bytes + 1
                });
            });
        });
    }
    group.finish();
}

criterion_group!(benches, four_kib_reads);
criterion_main!(benches);
