//! The cost of checking an SQE in mediated mode. The goal is less than 20 ns.

#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use ringpass_restrictions::{Access, KernelSupport, LinuxVersion, OffsetWindow, Policy, RingMemory, Sqe, Verdict};

const KERNEL: LinuxVersion = LinuxVersion { major: 6, minor: 18 };

fn check(criterion: &mut Criterion) {
    let read = Sqe { opcode: 4, flags: 1, off: 8192, addr: 1 << 45, len: 4096, rw_flags: 2, ..Sqe::default() };
    let window = OffsetWindow { start_bytes: 0, len_bytes: 1 << 40 };
    let mut group = criterion.benchmark_group("policy_check");
    for (name, policy) in [
        ("direct", Policy::direct(Access::ReadWrite)),
        ("mediated", Policy::mediated(Access::ReadWrite).with_offset_window(window)),
    ] {
        let checker = policy.checker(&KernelSupport::upstream(KERNEL));
        assert_eq!(checker.check(&read), Verdict::Allowed);
        // From the words in the ring, as in mediated mode.
        let words = read.to_words();
        let mut memory = RingMemory::default();
        group.bench_function(format!("{name}: an SQE that is allowed"), |bencher| {
            bencher.iter(|| checker.check_next(&Sqe::from_words(black_box(words)), &mut memory));
        });
        let open = Sqe { opcode: 18, ..read }.to_words();
        group.bench_function(format!("{name}: an SQE that is refused"), |bencher| {
            bencher.iter(|| checker.check_next(&Sqe::from_words(black_box(open)), &mut memory));
        });
        group.bench_function(format!("{name}: allowed, by the policy itself"), |bencher| {
            bencher.iter(|| policy.check(&Sqe::from_words(black_box(words))));
        });
    }
    group.finish();
}

criterion_group!(benches, check);
criterion_main!(benches);
