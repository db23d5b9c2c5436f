//! The configuration space and the channel to the front-end.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use super::*;
use crate::virtqueue::InflightRegion;

fn config(offset_bytes: u32, size_bytes: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
    let header = [offset_bytes, size_bytes, flags];
    header.iter().flat_map(|word| word.to_ne_bytes()).chain(bytes.iter().copied()).collect()
}

#[test]
fn any_part_of_the_configuration_space_can_be_read_and_it_ends_in_zeroes() {
    with_session(|rig| {
        assert_eq!(rig.ask(Code::GET_CONFIG, config(8, 4, 0, &[0; 4])), config(8, 4, 0, &[8, 9, 10, 11]));
        // Without room for the reply, and with the flag that crosvm sets.
        assert_eq!(rig.ask(Code::GET_CONFIG, config(58, 4, 1, &[])), config(58, 4, 1, &[58, 59, 0, 0]));
        let whole = rig.ask(Code::GET_CONFIG, config(0, 256, 0, &[0; 256]));
        assert_eq!(whole.len(), 12 + 256);
        assert!(whole[12 + 60..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn offsets_may_count_from_the_configuration_space_of_virtio_mmio() {
    with_session(|rig| {
        assert_eq!(rig.ask(Code::GET_CONFIG, config(256 + 8, 4, 1, &[0; 4])), config(256 + 8, 4, 1, &[8, 9, 10, 11]));
    });
}

#[test]
fn the_driver_writes_only_writable_fields() {
    with_session(|rig| {
        rig.ok(Code::SET_CONFIG, config(32, 1, 0, &[0]), []);
        assert_eq!(rig.calls.take(), [Call::WriteConfig(32, vec![0])]);
        let error = rig.refused(Code::SET_CONFIG, config(32, 1, 4, &[1]), no_fds);
        assert_eq!(error, "SET_CONFIG: flags 0x4 have no meaning");
    });
}

/// VMMs pass on what a driver writes: QEMU any value of `writeback`, crosvm any value at any offset.
#[test]
fn a_refused_write_of_the_driver_never_ends_the_connection() {
    let wide = [1; 16];
    with_session(|rig| {
        for (offset_bytes, bytes) in [
            (31, &[30, 1][..]),
            (0, &[1]),
            (4090, &wide),
            (4096, &[1]),
            (u32::MAX, &[1]),
            (u32::MAX - 4, &wide),
            (32, &[]),
        ] {
            for flags in [0, 1] {
                let body = config(offset_bytes, bytes.len() as u32, flags, bytes);
                assert_eq!(rig.ack(Code::SET_CONFIG, &body, []), 1, "{offset_bytes} {flags}");
                rig.ok(Code::SET_CONFIG, &body, []);
            }
        }
        assert_eq!(rig.calls.take(), []);
        rig.ok(Code::SET_CONFIG, config(32, 1, 0, &[0]), []);
        assert_eq!(rig.calls.take(), [Call::WriteConfig(32, vec![0])]);
    });
}

/// The size in the reply expresses the refusal. crosvm passes on any offset that the driver reads from.
#[test]
fn an_invalid_range_of_the_configuration_space_is_answered_with_no_bytes() {
    with_session(|rig| {
        for (offset_bytes, size_bytes) in [(0, 0), (4096, 1), (4000, 97), (u32::MAX, 1), (1, u32::MAX)] {
            let body = config(offset_bytes, size_bytes, 1, &[]);
            assert_eq!(rig.ask(Code::GET_CONFIG, &body), config(offset_bytes, 0, 1, &[]));
        }
        assert_eq!(rig.ask(Code::GET_CONFIG, config(8, 1, 0, &[0])), config(8, 1, 0, &[8]));
    });
}

#[test]
fn the_in_flight_region_keeps_what_the_driver_wrote_for_the_next_process() {
    let region = memfd(1 << 16);
    let description = [words(&[1 << 16, 0]), vec![1, 0, 0, 1, 0, 0, 0, 0]].concat();
    let give = |rig: &mut Rig<'_>| {
        rig.ok(Code::SET_INFLIGHT_FD, &description, [region.try_clone().unwrap()]);
        rig.calls.take()
    };
    with_session(|rig| {
        assert_eq!(give(rig), []);
        rig.ok(Code::SET_CONFIG, config(32, 1, 0, &[0]), []);
    });
    with_session(|rig| {
        assert_eq!(give(rig), [Call::RestoreDriverSettings(1)]);
        rig.ok(Code::SET_CONFIG, config(32, 1, 0, &[1]), []);
    });
    with_session(|rig| {
        assert_eq!(give(rig), []);
        // The region also keeps what the driver wrote before the session had a region.
        rig.ok(Code::SET_CONFIG, config(32, 1, 0, &[0]), []);
    });
    with_session(|rig| {
        rustix::io::pwrite(&region, &[0; 8], 0).unwrap();
        rig.ok(Code::SET_CONFIG, config(32, 1, 0, &[0]), []);
        give(rig);
        assert_eq!(give(rig), [Call::RestoreDriverSettings(1)]);
    });
}

#[test]
fn a_migration_writes_only_changed_bytes() {
    with_session(|rig| {
        let mut space: Vec<u8> = (0..60).collect();
        for flags in [1, 2] {
            rig.ok(Code::SET_CONFIG, config(0, 60, flags, &space), []);
            assert_eq!(rig.calls.take(), []);
        }
        space[32] = 0;
        rig.ok(Code::SET_CONFIG, config(0, 60, 1, &space), []);
        assert_eq!(rig.calls.take(), [Call::WriteConfig(32, vec![0])]);
        space[0] = 1;
        assert_eq!(rig.ack(Code::SET_CONFIG, config(0, 60, 1, &space), []), 1);
        // Beyond the end there are zeroes.
        rig.ok(Code::SET_CONFIG, config(60, 4, 1, &[0; 4]), []);
        assert_eq!(rig.ack(Code::SET_CONFIG, config(60, 4, 1, &[0, 0, 0, 1]), []), 1);
    });
}

#[test]
fn the_announcement_of_a_change_never_waits_for_the_front_end() {
    with_session(|rig| {
        rig.session.notify_config_change();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        rig.ok(Code::SET_BACKEND_REQ_FD, [], [ours.into()]);
        // More than the socket holds, because the front-end does not read.
        for _ in 0..10_000 {
            rig.session.notify_config_change();
        }
        let mut first = [0; 12];
        theirs.read_exact(&mut first).unwrap();
        let expected = [2_u32, 1, 0].map(u32::to_ne_bytes);
        assert_eq!(first, *expected.as_flattened());
        drop(theirs);
        rig.session.notify_config_change();
    });
}

/// GET_INFLIGHT_FD and SET_INFLIGHT_FD for one queue of 256, as QEMU sends them.
fn new_region(rig: &mut Rig<'_>) -> (Vec<u8>, OwnedFd) {
    let asked = [words(&[0, 0]), vec![1, 0, 0, 1, 0, 0, 0, 0]].concat();
    let Reply { body, fd, .. } = rig.send(Code::GET_INFLIGHT_FD, asked, []).unwrap().expect("a reply");
    (body, fd.expect("a region"))
}

/// Runs `test` with a session, protocol features negotiated, on a device with this record.
fn with_device_that_records(record: &[u8], is_resized: bool, test: impl FnOnce(&mut Rig<'_>)) {
    let mut device = FakeDevice::default();
    device.record = record.to_vec();
    let calls = device.calls.clone();
    calls.is_resized.store(is_resized, Ordering::Relaxed);
    let mut rig = Rig { session: Session::new(&mut device), calls };
    rig.ok(Code::SET_PROTOCOL_FEATURES, OFFERED.bits().to_ne_bytes(), []);
    rig.calls.take();
    test(&mut rig);
}

#[test]
fn a_guest_is_only_served_by_the_device_that_it_was_told_of() {
    let mut region = None;
    with_device_that_records(b"one", false, |rig| {
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES]), []);
        let (description, fd) = new_region(rig);
        rig.ok(Code::SET_INFLIGHT_FD, &description, [fd.try_clone().unwrap()]);
        region = Some((description, fd));
    });
    let (description, fd) = region.expect("a region");
    for ack_wanted in [true, false] {
        with_device_that_records(b"other", false, |rig| {
            rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES]), []);
            rig.calls.take();
            let given = message(Code::SET_INFLIGHT_FD, ack_wanted, &description, vec![fd.try_clone().unwrap()]);
            let error = rig.session.handle(given).unwrap_err().to_string();
            assert_eq!(
                error, "SET_INFLIGHT_FD: another device",
                "the session ends, regardless of how the front-end would handle a refusal"
            );
            assert_eq!(rig.calls.take(), []);
        });
    }
    with_device_that_records(b"one", false, |rig| {
        rig.ok(Code::SET_INFLIGHT_FD, &description, [fd.try_clone().unwrap()]);
        rig.run(0);
    });
}

#[test]
fn nothing_is_recorded_before_the_driver_has_accepted_features() {
    with_device_that_records(b"one", false, |rig| {
        let (description, fd) = new_region(rig);
        let found = |fd: &OwnedFd| {
            let size_bytes = u64::from_ne_bytes(description[..8].try_into().unwrap());
            InflightRegion::from_fd(fd.try_clone().unwrap(), 0, size_bytes, 1, 256).unwrap().device_record()
        };
        rig.ok(Code::SET_INFLIGHT_FD, &description, [fd.try_clone().unwrap()]);
        assert_eq!(found(&fd), None);
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES]), []);
        assert_eq!(found(&fd).as_deref(), Some(&b"one"[..]));
    });
}

#[test]
fn a_running_guest_learns_that_its_disk_grew_while_it_had_no_server() {
    let mut region = None;
    with_device_that_records(b"one", false, |rig| {
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES]), []);
        let (description, fd) = new_region(rig);
        rig.ok(Code::SET_INFLIGHT_FD, &description, [fd.try_clone().unwrap()]);
        region = Some((description, fd));
    });
    let (description, fd) = region.expect("a region");
    with_device_that_records(b"one", true, |rig| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        rig.ok(Code::SET_BACKEND_REQ_FD, [], [ours.into()]);
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES]), []);
        rig.ok(Code::SET_INFLIGHT_FD, &description, [fd]);
        rig.run(0);
        assert!(theirs.read(&mut [0; 12]).is_err(), "QEMU would ask in the middle of another question");
        rig.ok(Code::SET_STATUS, words(&[0xf]), []);
        assert_eq!(theirs.read(&mut [0; 12]).unwrap(), 12);
        rig.ok(Code::SET_STATUS, words(&[0xf]), []);
        assert!(theirs.read(&mut [0; 12]).is_err(), "once");
    });
}

#[test]
fn the_next_front_end_starts_without_the_previous_drivers_settings() {
    let mut device = FakeDevice::default();
    let calls = device.calls.clone();
    for _ in 0..2 {
        let mut rig = Rig { session: Session::new(&mut device), calls: calls.clone() };
        rig.ok(Code::SET_PROTOCOL_FEATURES, OFFERED.bits().to_ne_bytes(), []);
        assert_eq!(rig.ask(Code::GET_CONFIG, config(32, 1, 0, &[0])), config(32, 1, 0, &[32]));
        rig.ok(Code::SET_CONFIG, config(32, 1, 0, &[0]), []);
        assert_eq!(rig.ask(Code::GET_CONFIG, config(32, 1, 0, &[0])), config(32, 1, 0, &[0]));
    }
}

#[test]
fn a_front_end_that_leaves_for_lack_of_queues_gets_a_line_with_the_option() {
    with_session(|rig| {
        assert_eq!(rig.session.departure_hint(), None);
        rig.ask_number(Code::GET_QUEUE_NUM);
        let hint = rig.session.departure_hint().expect("a hint");
        assert!(hint.contains("learning that the device has 3 queues") && hint.contains("--num-queues"), "{hint}");
        rig.ok(Code::SET_OWNER, [], []);
        assert_eq!(rig.session.departure_hint(), None);
    });
}
