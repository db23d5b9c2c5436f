//! Tests of commands and their encoding.

use ringpass_guest_abi::{Doorbell, FixedAddressing, RingLayout};
use ringpass_workload::{Verify, Wait};

use super::*;

fn job() -> Job {
    Job {
        area_offset_bytes: 1,
        area_bytes: 2,
        operations: 3,
        duration_ns: 4,
        timeout_ns: 5,
        pause_ns: 6,
        seed: u64::MAX,
        buffers_gpa: 8,
        buffer_stride_bytes: 9,
        block_bytes: 10,
        depth: 11,
        write_percent: 12,
        durable_percent: 13,
        wait: Wait::InterruptMuting,
        verify: Verify::On,
    }
}

fn attachment() -> Attachment {
    Attachment {
        rings_gpa: 1,
        sqes_gpa: 2,
        layout: RingLayout {
            sq_entries: 3,
            cq_entries: 4,
            sq_head_offset: 5,
            sq_tail_offset: 6,
            sq_flags_offset: 7,
            cq_head_offset: 8,
            cq_tail_offset: 9,
            cq_flags_offset: 10,
            cqes_offset: 11,
            rings_bytes: 12,
            sqes_bytes: 13,
            doorbell: Doorbell::Always,
        },
        addressing: FixedAddressing::new(14 << 30, 22).unwrap(),
        bell: Bell::Mmio(15),
        ram: core::array::from_fn(|index| RamRegion { gpa: 16 + index as u64, len_bytes: 32 + index as u64 }),
        tick_rate: TickRate::from_khz(2_500_000).expect("not 0"),
    }
}

fn attack() -> Attack {
    Attack {
        ram: core::array::from_fn(|index| RamRegion { gpa: 1 + index as u64, len_bytes: 40 + index as u64 }),
        filled_holes: [RamRegion { gpa: 50, len_bytes: 51 }; ATTACK_EXTENTS_MAX],
        empty_holes: [RamRegion { gpa: 52, len_bytes: 53 }; ATTACK_EXTENTS_MAX],
        host_addresses: core::array::from_fn(|index| u64::MAX - index as u64),
        addressing: FixedAddressing::new(54 << 30, 30).unwrap(),
        buffer_gpa: 55,
        buffer_bytes: 56,
        disk_bytes: 57,
        disk_offset_bytes: 58,
        read_only: true,
        zero_length: false,
        timeout_ns: 59,
    }
}

#[test]
fn an_attack_ignores_empty_entries() {
    let mut attack = attack();
    attack.filled_holes = [RamRegion::default(); ATTACK_EXTENTS_MAX];
    attack.empty_holes[1].len_bytes = 0;
    attack.host_addresses[3] = 0;
    attack.with_target(|target| {
        assert_eq!(target.ram.len(), RAM_REGIONS_MAX);
        assert_eq!(target.filled_holes, []);
        assert_eq!(target.empty_holes.len(), ATTACK_EXTENTS_MAX - 1);
        assert_eq!(target.host_addresses, [u64::MAX, u64::MAX - 1, u64::MAX - 2]);
    });
}

#[test]
fn every_command_is_decoded_from_its_words() {
    let table = Table { offset_bytes: 77, entries: 78 };
    let commands = [
        Command::Attach(attachment()),
        Command::Attach(Attachment { bell: Bell::Port(0x201), ..attachment() }),
        Command::Attach(Attachment { bell: Bell::None, ..attachment() }),
        Command::Prefill(job(), table),
        Command::Run(job(), table),
        Command::Hostile(attack()),
        Command::VerifyAll(Job { wait: Wait::Poll, verify: Verify::Off, ..job() }, table),
    ];
    for command in commands {
        assert_eq!(Command::from_words(&command.to_words()), Ok(command));
    }
}

#[test]
fn words_that_are_not_a_command_are_refused() {
    let with = |index: usize, value| {
        let mut words = Command::Run(job(), Table::default()).to_words();
        words[index] = value;
        Command::from_words(&words)
    };
    assert_eq!(with(0, 99), Err(MalformedCommand));
    // After the kind: two words of the table, nine of 64 bits, four of 32 bits, wait, verify.
    assert_eq!(with(12, 1 << 32), Err(MalformedCommand));
    assert_eq!(with(16, 3), Err(MalformedCommand));
    assert_eq!(with(17, 2), Err(MalformedCommand));
    assert!(with(17, 0).is_ok());
}

#[test]
fn ticks_become_nanoseconds_without_drift_over_a_day() {
    let rate = TickRate::from_khz(2_596_096).expect("not 0");
    let day_ns = 86_400 * 1_000_000_000u64;
    let ticks = (u128::from(day_ns) * 2_596_096 / 1_000_000) as u64;
    assert!(rate.ns(ticks).abs_diff(day_ns) < day_ns / 1_000_000_000);
}

#[test]
fn a_counter_without_ticks_is_refused() {
    assert_eq!(TickRate::from_khz(0), None);
    assert!(TickRate::from_khz(1).is_some());
}
