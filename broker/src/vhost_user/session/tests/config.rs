//! The configuration space and the channel to the front-end.

use std::io::Read;
use std::os::unix::net::UnixStream;

use super::*;

fn config(offset_bytes: u32, size_bytes: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
    let header = [offset_bytes, size_bytes, flags];
    header.iter().flat_map(|word| word.to_ne_bytes()).chain(bytes.iter().copied()).collect()
}

#[test]
fn any_part_of_the_configuration_space_can_be_read_and_it_ends_in_zeroes() {
    with_session(|rig| {
        assert_eq!(rig.ask(Code::GET_CONFIG, config(8, 4, 0, &[0; 4])), config(8, 4, 0, &[8, 9, 10, 11]));
        // Without room for the answer, and with the flag that crosvm sets.
        assert_eq!(rig.ask(Code::GET_CONFIG, config(58, 4, 1, &[])), config(58, 4, 1, &[58, 59, 0, 0]));
        let whole = rig.ask(Code::GET_CONFIG, config(0, 256, 0, &[0; 256]));
        assert_eq!(whole.len(), 12 + 256);
        assert!(whole[12 + 60..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn the_configuration_space_can_be_counted_from_where_that_of_virtio_mmio_begins() {
    with_session(|rig| {
        assert_eq!(rig.ask(Code::GET_CONFIG, config(256 + 8, 4, 1, &[0; 4])), config(256 + 8, 4, 1, &[8, 9, 10, 11]));
    });
}

#[test]
fn the_driver_writes_what_is_writable_and_nothing_else() {
    with_session(|rig| {
        rig.ok(Code::SET_CONFIG, config(32, 1, 0, &[0]), []);
        assert_eq!(rig.calls.take(), [Call::WriteConfig(32, vec![0])]);
        let error = rig.refused(Code::SET_CONFIG, config(32, 1, 4, &[1]), no_fds);
        assert_eq!(error, "SET_CONFIG: flags 0x4 have no meaning");
    });
}

/// VMMs pass on what a driver writes: QEMU any value of `writeback`, crosvm any value anywhere.
#[test]
fn what_a_driver_writes_in_vain_is_answered_with_no_and_never_ends_the_connection() {
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

/// The size of the answer says no. crosvm passes on where the driver reads.
#[test]
fn a_part_of_the_configuration_space_that_cannot_be_is_answered_with_no_bytes() {
    with_session(|rig| {
        for (offset_bytes, size_bytes) in [(0, 0), (4096, 1), (4000, 97), (u32::MAX, 1), (1, u32::MAX)] {
            let body = config(offset_bytes, size_bytes, 1, &[]);
            assert_eq!(rig.ask(Code::GET_CONFIG, &body), config(offset_bytes, 0, 1, &[]));
        }
        assert_eq!(rig.ask(Code::GET_CONFIG, config(8, 1, 0, &[0])), config(8, 1, 0, &[8]));
    });
}

#[test]
fn what_the_driver_wrote_is_kept_in_the_in_flight_region_for_the_next_process() {
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
        // What was written before there is a region is kept in it, too.
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
fn a_migration_writes_only_what_differs() {
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
fn the_front_end_is_told_of_a_change_over_its_channel_without_being_waited_for() {
    with_session(|rig| {
        rig.session.notify_config_change();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        rig.ok(Code::SET_BACKEND_REQ_FD, [], [ours.into()]);
        // More than the socket holds: nobody reads.
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
