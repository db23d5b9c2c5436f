//! Set-up, start and stop of vrings.

use super::super::super::fake::{CHAINS_TAKEN, MAX_QUEUE_SIZE, Started};
use super::super::super::ring_fault::RingFault;
use super::*;

const EVENT_IDX: u64 = 1 << 29;

fn started(index: u16) -> Started {
    Started {
        index,
        size: 256,
        gpas: ring_gpas(index.into()),
        next_avail: 100,
        eventfds: [true, false, false],
        ..Started::default()
    }
}

#[test]
fn a_ring_starts_with_its_kick_at_the_guests_addresses_and_runs_once_it_is_enabled() {
    with_session(|rig| {
        rig.add_memory();
        rig.set_up(1);
        rig.calls.take();
        rig.kick(1);
        assert_eq!(rig.calls.take(), [Call::Start(started(1))]);
        rig.enable(1);
        rig.enable(1);
        assert_eq!(rig.calls.take(), [Call::SetEnabled(1, true)]);
        rig.ok(Code::SET_VRING_ENABLE, state(1, 0), []);
        assert_eq!(rig.calls.take(), [Call::SetEnabled(1, false)]);
    });
}

#[test]
fn without_protocol_features_a_ring_is_enabled_from_the_start() {
    with_session(|rig| {
        rig.ok(Code::SET_FEATURES, words(&[EVENT_IDX]), []);
        rig.add_memory();
        rig.set_up(0);
        rig.calls.take();
        rig.kick(0);
        let ring = Started { driver_features: EVENT_IDX, ..started(0) };
        assert_eq!(rig.calls.take(), [Call::Start(ring), Call::SetEnabled(0, true)]);
    });
}

#[test]
fn a_ring_may_be_enabled_before_its_set_up() {
    with_session(|rig| {
        rig.enable(2);
        assert_eq!(rig.calls.take(), []);
        rig.add_memory();
        rig.set_up(2);
        rig.calls.take();
        rig.kick(2);
        assert_eq!(rig.calls.take(), [Call::Start(started(2)), Call::SetEnabled(2, true)]);
    });
}

#[test]
fn a_kick_without_a_descriptor_starts_a_ring_that_is_polled() {
    with_session(|rig| {
        rig.add_memory();
        rig.set_up(0);
        rig.calls.take();
        rig.ok(Code::SET_VRING_KICK, no_file(0), []);
        assert_eq!(rig.calls.take(), [Call::Start(Started { eventfds: [false; 3], ..started(0) })]);
    });
}

#[test]
fn eventfds_of_a_started_ring_can_change_at_any_time() {
    with_session(|rig| {
        rig.run(0);
        rig.call(0);
        rig.kick(0);
        rig.ok(Code::SET_VRING_ERR, file(0), [eventfd()]);
        rig.ok(Code::SET_VRING_CALL, no_file(0), []);
        let expected =
            [Call::SetCallFd(0, true), Call::SetKickFd(0, true), Call::SetErrFd(0, true), Call::SetCallFd(0, false)];
        assert_eq!(rig.calls.take(), expected);
    });
}

#[test]
fn a_restarted_ring_keeps_its_eventfds() {
    with_session(|rig| {
        rig.call(0);
        rig.ok(Code::SET_VRING_ERR, file(0), [eventfd()]);
        rig.run(0);
        rig.stop(0);
        rig.calls.take();
        rig.kick(0);
        let ring = Started { eventfds: [true; 3], next_avail: 100 + CHAINS_TAKEN, ..started(0) };
        assert_eq!(rig.calls.take(), [Call::Start(ring), Call::SetEnabled(0, true)]);
    });
}

#[test]
fn get_vring_base_returns_the_stop_index_or_the_base() {
    with_session(|rig| {
        rig.run(0);
        assert_eq!(rig.stop(0), u32::from(100 + CHAINS_TAKEN));
        assert_eq!(rig.calls.take(), [Call::Stop(0)]);
        assert_eq!(rig.stop(0), u32::from(100 + CHAINS_TAKEN));
        rig.ok(Code::SET_VRING_BASE, state(1, 0xffff), []);
        assert_eq!(rig.stop(1), 0xffff);
        assert_eq!(rig.stop(2), 0);
        assert_eq!(rig.calls.take(), []);
    });
}

#[test]
fn repeating_the_same_set_up_does_not_stop_a_ring() {
    with_session(|rig| {
        rig.run(0);
        rig.ok(Code::SET_VRING_NUM, state(0, 256), []);
        rig.ok(Code::SET_VRING_ADDR, ring_address(0, None), []);
        assert_eq!(rig.calls.take(), []);
    });
}

/// The messages of Cloud Hypervisor after a reset of the guest, without GET_VRING_BASE.
#[test]
fn a_changed_set_up_stops_a_running_ring_and_its_kick_starts_it_again() {
    let changes = [
        (Code::SET_VRING_NUM, state(0, 128)),
        (Code::SET_VRING_ADDR, address(0, ring_offsets(1).map(|offset| USER + offset), None)),
        (Code::SET_VRING_BASE, state(0, 5)),
    ];
    for (code, body) in changes {
        with_session(|rig| {
            rig.run(0);
            rig.ok(Code::SET_VRING_ENABLE, state(0, 0), []);
            rig.ok(code, &body, []);
            assert_eq!(rig.calls.take(), [Call::SetEnabled(0, false), Call::Stop(0)], "{code:?}");
            rig.kick(0);
            rig.enable(0);
            let mut expected = Started { next_avail: 100 + CHAINS_TAKEN, ..started(0) };
            match code {
                Code::SET_VRING_NUM => expected.size = 128,
                Code::SET_VRING_ADDR => expected.gpas = ring_gpas(1),
                _ => expected.next_avail = 5,
            }
            assert_eq!(rig.calls.take(), [Call::Start(expected), Call::SetEnabled(0, true)], "{code:?}");
        });
    }
}

#[test]
fn the_index_of_a_vring_that_does_not_exist_is_refused() {
    with_session(|rig| {
        let too_high =
            format!("vring 3 does not exist: the device has {}; a front-end with more needs a larger --num-queues", 3);
        let by_index: [(Code, Vec<u8>, bool); 7] = [
            (Code::SET_VRING_NUM, state(3, 256), false),
            (Code::SET_VRING_ADDR, address(3, [USER; 3], None), false),
            (Code::SET_VRING_BASE, state(3, 0), false),
            (Code::SET_VRING_ENABLE, state(3, 1), false),
            (Code::SET_VRING_KICK, file(3), true),
            (Code::SET_VRING_CALL, file(3), true),
            (Code::SET_VRING_ERR, file(3), true),
        ];
        for (code, body, has_fd) in by_index {
            let fds = || if has_fd { vec![eventfd()] } else { vec![] };
            assert_eq!(rig.refused(code, body, fds), format!("{code:?}: {too_high}"));
        }
        let error = rig.send(Code::GET_VRING_BASE, state(u32::MAX, 0), []).unwrap_err().to_string();
        assert_eq!(
            error,
            "GET_VRING_BASE: vring 4294967295 does not exist: the device has 3; a front-end with more needs a larger --num-queues"
        );
    });
}

/// Values that a driver can write to the registers of its transport, and the fault with which the ring breaks.
fn faults_of_drivers() -> Vec<(Code, Vec<u8>, RingFault)> {
    let size = |size| {
        let fault = RingFault::Size { size, max: MAX_QUEUE_SIZE };
        (Code::SET_VRING_NUM, state(0, size), fault)
    };
    let at = |part: usize, user_address: u64, fault| {
        let mut parts = ring_offsets(0).map(|offset| USER + offset);
        parts[part] = user_address;
        (Code::SET_VRING_ADDR, address(0, parts, None), fault)
    };
    let outside = |user_address| {
        let fault = RingFault::OutsideMemory { part: "used ring", user_address, size_bytes: 4 + 256 * 8 };
        at(2, user_address, fault)
    };
    let misaligned = |number, part, alignment_bytes: u64| {
        let offset = alignment_bytes / 2;
        at(number, USER + offset, RingFault::Misaligned { part, gpa: GPA + offset, alignment_bytes })
    };
    let mut faults = Vec::from([0, 3, 15, 2048, 0x1_0000, u32::MAX].map(size));
    // Behind, before and across the end of memory, and at the end of 64-bit addresses.
    faults.extend([USER + MEMORY_BYTES, USER - 16, USER + MEMORY_BYTES - 2048, 0, u64::MAX - 15].map(outside));
    faults.push(misaligned(0, "descriptor table", 16));
    faults.push(misaligned(1, "available ring", 2));
    faults.push(misaligned(2, "used ring", 4));
    faults
}

#[test]
fn a_driver_fault_breaks_the_ring_and_a_new_set_up_revives_it() {
    for (code, body, fault) in faults_of_drivers() {
        with_session(|rig| {
            rig.add_memory();
            rig.ok(Code::SET_VRING_ERR, file(0), [eventfd()]);
            rig.set_up(0);
            rig.set_up(1);
            rig.calls.take();
            rig.ok(code, &body, []);
            rig.kick(0);
            rig.kick(1);
            rig.enable(0);
            rig.enable(1);
            let expected = [Call::Break(0, fault.clone(), true), Call::Start(started(1)), Call::SetEnabled(1, true)];
            assert_eq!(rig.calls.take(), expected, "only that ring is broken");
            rig.call(0);
            assert_eq!(rig.stop(0), 100, "a broken ring stops where it began");
            assert_eq!(rig.stop(1), u32::from(100 + CHAINS_TAKEN));
            rig.ok(Code::SET_STATUS, words(&[0]), []);
            rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES]), []);
            rig.calls.take();

            rig.set_up(0);
            rig.kick(0);
            let ring = Started { eventfds: [true; 3], ..started(0) };
            assert_eq!(rig.calls.take(), [Call::Start(ring), Call::SetEnabled(0, true)], "{fault}");
        });
    }
}

/// QEMU aborts a migration, or drops the device, after any other answer.
#[test]
fn driver_faults_are_acknowledged_as_success() {
    for (code, body, fault) in faults_of_drivers() {
        with_session(|rig| {
            rig.add_memory();
            rig.set_up(0);
            assert_eq!(rig.ack(code, &body, []), 0, "{fault}");
            assert_eq!(rig.ack(Code::SET_VRING_KICK, file(0), [eventfd()]), 0, "{fault}");
            assert_eq!(rig.ack(Code::SET_VRING_ENABLE, state(0, 1), []), 0, "{fault}");
        });
    }
}

#[test]
fn a_fault_in_a_changed_set_up_stops_and_breaks_a_running_ring() {
    for (code, body, fault) in faults_of_drivers() {
        with_session(|rig| {
            rig.run(0);
            rig.ok(code, &body, []);
            rig.kick(0);
            assert_eq!(rig.calls.take(), [Call::Stop(0), Call::Break(0, fault, false)]);
        });
    }
}

#[test]
fn the_dirty_log_ends_when_a_broken_ring_is_the_last_to_stop() {
    with_session(|rig| {
        rig.add_memory();
        rig.set_up(0);
        rig.ok(Code::SET_VRING_NUM, state(0, 15), []);
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES | LOG_ALL]), []);
        rig.send(Code::SET_LOG_BASE, words(&[4096, 0]), [memfd(4096)]).unwrap();
        rig.kick(0);
        rig.calls.take();
        rig.stop(0);
        assert_eq!(rig.calls.take(), [Call::SetDirtyLog(false)]);
    });
}

#[test]
fn a_ring_without_addresses_is_not_started() {
    with_session(|rig| {
        rig.ok(Code::SET_VRING_NUM, state(0, 256), []);
        let error = rig.refused(Code::SET_VRING_KICK, file(0), || vec![eventfd()]);
        assert_eq!(error, "SET_VRING_KICK: vring 0 cannot start: the front-end must send SET_VRING_ADDR first");
    });
}

#[test]
fn a_descriptor_that_is_not_an_eventfd_is_refused() {
    with_session(|rig| {
        rig.run(0);
        for code in [Code::SET_VRING_KICK, Code::SET_VRING_CALL, Code::SET_VRING_ERR] {
            let error = rig.refused(code, file(0), || vec![memfd(8)]);
            let expected = "vring 0: the file descriptor is not an eventfd but /memfd:vhost-user-test";
            assert!(error.contains(expected), "{error}");
        }
    });
}

#[test]
fn a_ring_that_starts_with_an_in_flight_region_is_tracked_in_it() {
    with_session(|rig| {
        rig.add_memory();
        rig.set_up(0);
        let asked = [words(&[0, 0]), vec![3, 0, 0, 1, 0, 0, 0, 0]].concat();
        let reply = rig.send(Code::GET_INFLIGHT_FD, &asked, []).unwrap().unwrap();
        // QEMU compares the size of the structure.
        assert_eq!(reply.body.len(), asked.len());
        assert_eq!(reply.body[16..], asked[16..]);
        let size_bytes = u64::from_ne_bytes(reply.body[..8].try_into().unwrap());
        let region = reply.fd.expect("the region");
        assert_eq!(rustix::fs::fstat(&region).unwrap().st_size as u64, size_bytes);

        rig.ok(Code::SET_INFLIGHT_FD, &reply.body, [region]);
        rig.calls.take();
        rig.kick(0);
        assert_eq!(rig.calls.take(), [Call::Start(Started { is_tracked: true, ..started(0) })]);
    });
}

#[test]
fn a_driver_reset_clears_the_in_flight_records_of_rings_that_ran() {
    /// Offset of `version` in the region of a queue (0 in an unused region), and distance from one queue to the next.
    const VERSION_OFFSET: u64 = 8;
    const STRIDE: u64 = 16 + 256 * 16 + 48;
    let region = memfd(1 << 16);
    let description = [words(&[1 << 16, 0]), vec![2, 0, 0, 1, 0, 0, 0, 0]].concat();
    let mark_used = || {
        for index in 0..2 {
            rustix::io::pwrite(&region, &[1], index * STRIDE + VERSION_OFFSET).unwrap();
        }
    };
    let are_used = || {
        [0, 1].map(|index| {
            let mut version = [0];
            rustix::io::pread(&region, &mut version, index * STRIDE + VERSION_OFFSET).unwrap();
            version == [1]
        })
    };
    for reset in [Code::SET_STATUS, Code::RESET_DEVICE] {
        with_session(|rig| {
            mark_used();
            rig.ok(Code::SET_INFLIGHT_FD, &description, [region.try_clone().unwrap()]);
            rig.run(0);
            rig.ok(Code::SET_STATUS, words(&[0xf]), []);
            rig.stop(0);
            assert_eq!(are_used(), [true, true], "a ring that only stops will go on");
            rig.ok(reset, if reset == Code::SET_STATUS { words(&[0]) } else { vec![] }, []);
            assert_eq!(are_used(), [false, true]);
        });
    }
}

#[test]
fn an_in_flight_region_must_fit_the_device_and_its_rings() {
    with_session(|rig| {
        for (queues, queue_size) in [(4_u16, 256_u16), (1, 2048)] {
            let mut asked = words(&[1 << 20, 0]);
            asked.extend([queues, queue_size].iter().flat_map(|word| word.to_ne_bytes()));
            let error = rig.refused(Code::SET_INFLIGHT_FD, &asked, || vec![memfd(1 << 20)]);
            let shape = format!("the in-flight region is for {queues} queues of {queue_size} descriptors; ");
            assert_eq!(error, format!("SET_INFLIGHT_FD: {shape}the device has 3 of at most 1024 (--num-queues)"));
            let reply = rig.send(Code::GET_INFLIGHT_FD, &asked, []).unwrap().expect("a reply with a refusal");
            assert_eq!((reply.body, reply.fd.is_none()), ([&[0; 16], &asked[16..]].concat(), true));
        }
        rig.add_memory();
        rig.set_up(0);
        let small = [words(&[4096, 0]), vec![1, 0, 128, 0]].concat();
        rig.ok(Code::SET_INFLIGHT_FD, small, [memfd(4096)]);
        rig.calls.take();
        rig.kick(0);
        let fault = RingFault::InflightTooSmall { size: 256, entries: 128 };
        assert_eq!(rig.calls.take(), [Call::Break(0, fault, false)]);
    });
}
