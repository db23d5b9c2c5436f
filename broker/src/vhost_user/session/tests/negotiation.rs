//! Features, acknowledgements, status, reset.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_RO};

use super::super::super::fake::{CHAINS_TAKEN, Call, FEATURES, QUEUES};
use super::*;

const EVENT_IDX: u64 = 1 << 29;
const ANY_LAYOUT: u64 = 1 << 27;
const RING_PACKED: u64 = 1 << 34;

#[test]
fn the_features_of_the_device_are_offered_with_those_of_vhost_user() {
    with_new_session(|rig| {
        assert_eq!(rig.ask_number(Code::GET_FEATURES), FEATURES | LOG_ALL | PROTOCOL_FEATURES);
        assert_eq!(rig.ask_number(Code::GET_PROTOCOL_FEATURES), OFFERED.bits());
    });
}

#[test]
fn requests_of_a_protocol_feature_are_refused_until_it_is_negotiated() {
    let inflight = [words(&[0, 0]), vec![1, 0, 1, 0]].concat();
    let config = [12_u32, 4, 0].iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
    let requests: [(Code, Vec<u8>, usize, &str); 12] = [
        (Code::GET_QUEUE_NUM, vec![], 0, "MQ"),
        (Code::SET_LOG_BASE, words(&[4096, 0]), 1, "LOG_SHMFD"),
        (Code::SET_BACKEND_REQ_FD, vec![], 1, "BACKEND_REQ"),
        (Code::SET_CONFIG, [&config[..], &[0; 4]].concat(), 0, "CONFIG"),
        (Code::SET_INFLIGHT_FD, inflight.clone(), 1, "INFLIGHT_SHMFD"),
        (Code::RESET_DEVICE, vec![], 0, "RESET_DEVICE"),
        (Code::GET_MAX_MEM_SLOTS, vec![], 0, "CONFIGURE_MEM_SLOTS"),
        (Code::ADD_MEM_REG, region(GPA, 4096, USER, 0), 1, "CONFIGURE_MEM_SLOTS"),
        (Code::REM_MEM_REG, region(GPA, 4096, USER, 0), 0, "CONFIGURE_MEM_SLOTS"),
        (Code::SET_STATUS, words(&[1]), 0, "STATUS"),
        (Code::GET_STATUS, vec![], 0, "STATUS"),
        (Code::SET_STATUS, words(&[0]), 0, "STATUS"),
    ];
    with_new_session(|rig| {
        for (code, body, fds, feature) in requests {
            let fds = std::iter::repeat_with(|| memfd(4096)).take(fds).collect();
            let error = rig.session.handle(message(code, false, &body, fds)).unwrap_err().to_string();
            assert_eq!(error, format!("{code:?}: VHOST_USER_PROTOCOL_F_{feature} was not negotiated"));
        }
        // These have a reply that expresses a refusal.
        assert_eq!(rig.ask(Code::GET_CONFIG, &config), state(12, 0).into_iter().chain([0; 4]).collect::<Vec<_>>());
        assert_eq!(rig.ask(Code::GET_INFLIGHT_FD, &inflight), inflight);
        assert_eq!(rig.calls.take(), []);
    });
}

/// Requests with a valid form and an invalid content, at any time. A request whose own reply cannot express a refusal
/// cannot be among them.
#[test]
fn a_senseless_request_is_refused_and_the_connection_goes_on() {
    let table = |count: u32| [&count.to_ne_bytes()[..], &[0; 4 + 32]].concat();
    let requests: [(Code, Vec<u8>, usize, &str); 11] = [
        (Code::SET_STATUS, words(&[0x100]), 0, "invalid value 0x100 of the device status"),
        (Code::SET_VRING_BASE, state(0, 0x1_0000), 0, "invalid value 0x10000 of the index of a split ring"),
        (Code::SET_VRING_ENABLE, state(0, 2), 0, "invalid value 0x2 of the state of a ring"),
        (Code::SET_VRING_KICK, words(&[0x200]), 1, "invalid value 0x200 of vring and flag"),
        (Code::SET_VRING_CALL, words(&[0x200]), 1, "invalid value 0x200 of vring and flag"),
        (Code::SET_VRING_ERR, words(&[1 << 63]), 1, "invalid value 0x8000000000000000 of vring and flag"),
        (Code::SET_VRING_ADDR, [state(0, 2), vec![0; 32]].concat(), 0, "invalid value 0x2 of flags"),
        (Code::SET_MEM_TABLE, table(254), 1, "invalid value 0xfe of the number of regions"),
        (Code::SET_CONFIG, [state(32, 1), vec![4, 0, 0, 0, 1]].concat(), 0, "flags 0x4 have no meaning"),
        (Code::POSTCOPY_END, vec![], 0, "not implemented"),
        (Code::IOTLB_MSG, vec![0; 40], 0, "not implemented"),
    ];
    with_session(|rig| {
        for (code, body, fds, expected) in requests {
            let fds = || std::iter::repeat_with(eventfd).take(fds).collect();
            assert_eq!(rig.refused(code, body, fds), format!("{code:?}: {expected}"));
        }
        assert_eq!(rig.ask_number(Code::GET_QUEUE_NUM), u64::from(QUEUES));
    });
}

#[test]
fn unoffered_features_are_ignored_unless_a_driver_relies_on_them() {
    with_session(|rig| {
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES | EVENT_IDX | ANY_LAYOUT]), []);
        assert_eq!(rig.calls.take(), [Call::SetDriverFeatures(EVENT_IDX)]);
        let error = rig.refused(Code::SET_FEATURES, words(&[EVENT_IDX | RING_PACKED]), no_fds);
        let expected = "SET_FEATURES: the driver uses features that this server does not offer: VIRTIO_F_RING_PACKED. \
                        If its guest runs";
        assert!(error.starts_with(expected), "{error}");
        // Features of an earlier server, which had another disk or other options.
        let device = 1 << VIRTIO_BLK_F_RO | 1 << VIRTIO_BLK_F_DISCARD | 1 << 23;
        let error = rig.refused(Code::SET_FEATURES, words(&[EVENT_IDX | device]), no_fds);
        assert!(
            error.contains("offer: VIRTIO_BLK_F_RO, VIRTIO_BLK_F_DISCARD, bit 23. If its guest runs, restart"),
            "{error}"
        );
        assert!(error.contains("(with --read-only)"), "{error}");
    });
}

#[test]
fn unoffered_protocol_features_are_refused() {
    with_session(|rig| {
        let inband_notifications = 1 << 14;
        let error = rig.refused(Code::SET_PROTOCOL_FEATURES, words(&[inband_notifications]), no_fds);
        assert_eq!(error, "SET_PROTOCOL_FEATURES: protocol features 0x4000 were not offered");
    });
}

#[test]
fn acknowledgements_are_only_sent_once_negotiated() {
    with_new_session(|rig| {
        let set_owner = || message(Code::SET_OWNER, true, &[], vec![]);
        assert!(rig.session.handle(set_owner()).unwrap().is_none());
        rig.ok(Code::SET_PROTOCOL_FEATURES, words(&[OFFERED.bits()]), []);
        assert_eq!(rig.session.handle(set_owner()).unwrap().unwrap().body, words(&[0]));
        rig.ok(Code::SET_OWNER, [], []);
    });
}

#[test]
fn a_request_with_its_own_reply_gets_no_acknowledgement_as_well() {
    with_session(|rig| assert_eq!(rig.ack(Code::GET_QUEUE_NUM, [], []), u64::from(QUEUES)));
}

#[test]
fn a_malformed_message_ends_the_session_even_if_it_asks_for_an_acknowledgement() {
    with_session(|rig| {
        let error = rig.session.handle(message(Code::SET_VRING_NUM, true, &[0; 7], vec![])).unwrap_err();
        assert_eq!(error.to_string(), "SET_VRING_NUM: a body of 7 bytes instead of 8");
    });
}

#[test]
fn an_unimplemented_request_is_refused() {
    with_session(|rig| {
        let error = rig.refused(Code::SEND_RARP, words(&[0]), no_fds);
        assert_eq!(error, "SEND_RARP: not implemented");
        let unknown = Header { request: 1000, needs_reply: false, body_bytes: 0 };
        let error = rig.session.handle(Message { header: unknown, body: vec![], fds: vec![] }).unwrap_err();
        assert_eq!(error.to_string(), "request 1000: not implemented");
    });
}

#[test]
fn the_drivers_features_cannot_change_while_a_ring_is_enabled() {
    with_session(|rig| {
        rig.run(1);
        let error = rig.refused(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES | EVENT_IDX]), no_fds);
        assert!(error.contains("while vring 1 is started and enabled"), "{error}");
        // The same features are no change.
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES]), []);
        assert_eq!(rig.calls.take(), []);
    });
}

#[test]
fn changed_features_stop_disabled_rings_and_a_kick_starts_them_again() {
    with_session(|rig| {
        rig.run(1);
        rig.ok(Code::SET_VRING_ENABLE, state(1, 0), []);
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES | EVENT_IDX]), []);
        rig.kick(1);
        let calls = rig.calls.take();
        assert_eq!(calls[..3], [Call::SetEnabled(1, false), Call::Stop(1), Call::SetDriverFeatures(EVENT_IDX)]);
        assert!(
            matches!(&calls[3..], [Call::Start(ring)] if ring.driver_features & EVENT_IDX != 0 && ring.next_avail == 100 + CHAINS_TAKEN),
            "{calls:?}"
        );
    });
}

/// The device may still have the features of an earlier front-end or driver.
#[test]
fn a_ring_that_starts_without_set_features_has_a_driver_without_features() {
    let starts_without_features = |rig: &mut Rig<'_>| {
        rig.kick(0);
        let calls = rig.calls.take();
        assert!(
            matches!(&calls[..2], [Call::SetDriverFeatures(0), Call::Start(ring)] if ring.driver_features == 0),
            "{calls:?}"
        );
    };
    with_new_session(|rig| {
        rig.ok(Code::SET_PROTOCOL_FEATURES, words(&[OFFERED.bits()]), []);
        rig.add_memory();
        rig.set_up(0);
        rig.calls.take();
        starts_without_features(rig);
    });
    with_session(|rig| {
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES | EVENT_IDX]), []);
        rig.run(0);
        // The driver's reset.
        rig.ok(Code::SET_STATUS, words(&[0]), []);
        rig.calls.take();
        starts_without_features(rig);
    });
}

#[test]
fn the_status_is_kept_and_a_status_of_0_stops_the_device() {
    with_session(|rig| {
        rig.run(0);
        rig.ok(Code::SET_STATUS, words(&[0xf]), []);
        assert_eq!(rig.ask_number(Code::GET_STATUS), 0xf);
        assert_eq!(rig.calls.take(), []);
        rig.ok(Code::SET_STATUS, words(&[0]), []);
        assert_eq!(rig.calls.take(), [Call::Stop(0)]);
        assert_eq!(rig.ask_number(Code::GET_STATUS), 0);
        // QEMU asks afterwards and must learn where the ring stopped, and it does not send the memory again.
        assert_eq!(rig.stop(0), u32::from(100 + CHAINS_TAKEN));
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES]), []);
        rig.kick(0);
        assert!(matches!(
            &rig.calls.take()[..],
            [Call::SetDriverFeatures(0), Call::Start(_), Call::SetEnabled(0, true)]
        ));
    });
}

#[test]
fn a_session_ends_when_its_front_end_leaves_while_a_ring_stops() {
    for (code, body) in [
        (Code::SET_STATUS, words(&[0])),
        (Code::RESET_DEVICE, vec![]),
        (Code::SET_VRING_BASE, state(0, 7)),
        (Code::GET_VRING_BASE, state(0, 0)),
    ] {
        with_session(|rig| {
            rig.run(0);
            rig.calls.take();
            rig.calls.is_front_end_gone.store(true, Ordering::Relaxed);
            // The session ends whether the front-end asks for an acknowledgement or not.
            let error = rig.session.handle(message(code, true, &body, no_fds())).unwrap_err().to_string();
            assert!(error.contains("the front-end is gone; I/O of vring 0 is still under way"), "{error}");
            assert_eq!(rig.calls.take(), [Call::Stop(0)], "{code:?}");
        });
    }
}

#[test]
fn a_reset_of_the_device_forgets_the_rings_and_keeps_memory_and_eventfds() {
    with_session(|rig| {
        rig.call(0);
        rig.run(0);
        rig.ok(Code::RESET_DEVICE, [], []);
        assert_eq!(rig.calls.take(), [Call::Stop(0)]);
        let error = rig.refused(Code::SET_VRING_KICK, file(0), || vec![eventfd()]);
        assert_eq!(error, "SET_VRING_KICK: vring 0 cannot start: the front-end must send SET_VRING_NUM first");
        rig.ok(Code::SET_FEATURES, words(&[PROTOCOL_FEATURES]), []);
        rig.calls.take();
        rig.set_up(0);
        rig.kick(0);
        let calls = rig.calls.take();
        assert!(matches!(&calls[0], Call::Start(ring) if ring.eventfds == [true, true, false]), "{calls:?}");
    });
}

#[test]
fn reset_owner_disables_the_rings_and_nothing_else() {
    with_session(|rig| {
        rig.run(2);
        rig.ok(Code::RESET_OWNER, [], []);
        assert_eq!(rig.calls.take(), [Call::SetEnabled(2, false)]);
    });
}
