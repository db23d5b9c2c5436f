//! The cost of making guest memory valid in SQEs: pinning it once, and adding a region while the rest stays pinned.

#![allow(missing_docs, reason = "criterion_group! makes a public function")]
//!
//! Needs RLIMIT_MEMLOCK of 512 MiB or CAP_IPC_LOCK. For guests on huge pages it needs as many of them, as in
//! `sysctl vm.nr_hugepages=4096`, and no limit: it leaves out the guests that do not fit.

use std::fs::File;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringpass_broker::memory::{GuestMemory, PinnedMemory, RegionConfig, Sharing};
use rustix::fs::MemfdFlags;

const LEN_BYTES: u64 = 256 << 20;

/// Guest RAM with allocated pages.
fn region(gpa: u64) -> RegionConfig {
    allocated(gpa, LEN_BYTES, MemfdFlags::CLOEXEC).expect("pages for the memfd")
}

fn allocated(gpa: u64, len_bytes: u64, flags: MemfdFlags) -> rustix::io::Result<RegionConfig> {
    let fd = rustix::fs::memfd_create("guest-ram", flags)?;
    rustix::fs::ftruncate(&fd, len_bytes)?;
    rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, len_bytes)?;
    Ok(RegionConfig { gpa, len_bytes, file: Arc::new(File::from(fd)), file_offset_bytes: 0 })
}

/// Each page costs little here, and what a page costs must not grow with the guest.
fn huge_pages(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pinning");
    group.sample_size(10);
    for gib in [1, 4, 8] {
        let region = match allocated(0, gib << 30, MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB) {
            Ok(region) => region,
            Err(error) => {
                eprintln!("left out: {gib} GiB of huge pages: {error}");
                continue;
            }
        };
        let memory = GuestMemory::new([region]).expect("valid memory");
        group.throughput(Throughput::Bytes(gib << 30));
        group.bench_function(format!("pin {gib} GiB of huge pages"), |bencher| {
            bencher.iter_with_large_drop(|| PinnedMemory::pin(&memory, Sharing::Clone).expect("pinned"));
        });
    }
    group.finish();
}

fn pinning(criterion: &mut Criterion) {
    let small = GuestMemory::new([region(0)]).expect("valid memory");
    let large = small.with_region(region(1 << 30)).expect("valid memory");
    let mut group = criterion.benchmark_group("pinning");
    group.sample_size(10).throughput(Throughput::Bytes(LEN_BYTES));
    group.bench_function("pin 256 MiB of 4 KiB pages", |bencher| {
        bencher.iter_with_large_drop(|| PinnedMemory::pin(&small, Sharing::Clone).expect("pinned"));
    });
    let pinned = PinnedMemory::pin(&small, Sharing::Clone).expect("pinned");
    group.bench_function("plug 256 MiB beside 256 MiB", |bencher| {
        bencher.iter_with_large_drop(|| pinned.changed_to(&large).expect("grown"));
    });
    group.bench_function("clone what is pinned", |bencher| {
        bencher.iter_with_large_drop(|| pinned.changed_to(&small).expect("grown by nothing"));
    });
    group.finish();
}

criterion_group!(benches, pinning, huge_pages);
criterion_main!(benches);
