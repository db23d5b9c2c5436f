//! The dirty log.

use std::io::Read;
use std::os::unix::net::UnixStream;

use super::*;

const LOG_BYTES: u64 = 0x3_0000;

impl Rig<'_> {
    fn set_log_base(&mut self) {
        let body = words(&[LOG_BYTES, 0]);
        let reply = self.send(Code::SET_LOG_BASE, &body, [memfd(LOG_BYTES)]).unwrap().expect("a reply");
        // rust-vmm's front-ends expect the description; QEMU accepts any body.
        assert_eq!(reply.body, body);
    }

    fn set_log_all(&mut self, is_on: bool) {
        let features = PROTOCOL_FEATURES | if is_on { LOG_ALL } else { 0 };
        self.ok(Code::SET_FEATURES, words(&[features]), []);
    }
}

#[test]
fn logging_is_switched_while_rings_run() {
    with_session(|rig| {
        rig.run(0);
        rig.set_log_base();
        assert_eq!(rig.calls.take(), []);
        rig.set_log_all(true);
        rig.ok(Code::SET_VRING_ADDR, ring_address(0, Some(0x1234)), []);
        assert_eq!(rig.calls.take(), [Call::SetDirtyLog(true), Call::SetUsedLog(0, Some(0x1234))]);
        rig.set_log_all(false);
        rig.ok(Code::SET_VRING_ADDR, ring_address(0, None), []);
        assert_eq!(rig.calls.take(), [Call::SetDirtyLog(false), Call::SetUsedLog(0, None)]);
    });
}

#[test]
fn a_log_is_exchanged_while_rings_run() {
    with_session(|rig| {
        rig.run(0);
        rig.set_log_base();
        rig.set_log_all(true);
        rig.calls.take();
        rig.set_log_base();
        assert_eq!(rig.calls.take(), [Call::SetDirtyLog(true)]);
    });
}

/// The messages of QEMU when a guest's driver starts during a migration.
#[test]
fn rings_that_start_before_the_log_arrives_are_held_until_then() {
    with_session(|rig| {
        rig.add_memory();
        rig.set_log_all(true);
        rig.set_up(0);
        rig.calls.take();
        rig.kick(0);
        rig.enable(0);
        assert!(matches!(rig.calls.take()[..], [Call::Start(_)]));
        rig.set_log_base();
        assert_eq!(rig.calls.take(), [Call::SetDirtyLog(true), Call::SetEnabled(0, true)]);
    });
}

#[test]
fn logging_without_a_log_holds_running_rings_until_it_is_off() {
    with_session(|rig| {
        rig.run(0);
        rig.set_log_all(true);
        assert_eq!(rig.calls.take(), [Call::SetEnabled(0, false)]);
        rig.set_log_all(false);
        assert_eq!(rig.calls.take(), [Call::SetEnabled(0, true)]);
    });
}

/// QEMU frees the log after it has stopped the device, and sends another when it starts the device again.
#[test]
fn a_log_is_not_used_again_after_the_last_ring_stopped() {
    with_session(|rig| {
        rig.run(0);
        rig.set_up(1);
        rig.kick(1);
        rig.set_log_base();
        rig.set_log_all(true);
        rig.calls.take();
        rig.stop(0);
        assert_eq!(rig.calls.take(), [Call::Stop(0)], "another ring still logs");
        rig.stop(1);
        assert_eq!(rig.calls.take(), [Call::Stop(1), Call::SetDirtyLog(false)], "only when no ring runs");
        rig.kick(0);
        assert!(matches!(rig.calls.take()[..], [Call::Start(_)]), "held until there is a new log");
        rig.set_log_base();
        assert_eq!(rig.calls.take(), [Call::SetDirtyLog(true), Call::SetEnabled(0, true)]);
    });
}

#[test]
fn a_ring_starts_with_the_place_of_its_used_ring_in_the_log() {
    with_session(|rig| {
        rig.add_memory();
        rig.set_up(0);
        rig.ok(Code::SET_VRING_ADDR, ring_address(0, Some(0x5000)), []);
        rig.calls.take();
        rig.kick(0);
        assert!(matches!(&rig.calls.take()[..], [Call::Start(ring)] if ring.used_log_gpa == Some(0x5000)));
    });
}

#[test]
fn without_log_shmfd_no_ring_is_held() {
    with_new_session(|rig| {
        rig.ok(Code::SET_PROTOCOL_FEATURES, words(&[OFFERED.bits() & !(1 << 1)]), []);
        rig.set_log_all(true);
        rig.run(0);
        rig.ok(Code::SET_VRING_ENABLE, state(0, 0), []);
        rig.enable(0);
        assert_eq!(rig.calls.take(), [Call::SetEnabled(0, false), Call::SetEnabled(0, true)]);
    });
}

#[test]
fn a_log_beyond_the_end_of_its_file_is_refused() {
    with_session(|rig| {
        let error = rig.send(Code::SET_LOG_BASE, words(&[LOG_BYTES + 1, 0]), [memfd(LOG_BYTES)]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("the dirty log: a shared area of 196609 bytes"), "{text}");
    });
}

#[test]
fn an_eventfd_for_the_log_is_accepted_and_closed_unused() {
    with_session(|rig| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        rig.ok(Code::SET_LOG_FD, [], [theirs.into()]);
        // The session has written nothing and has closed the descriptor: the other end sees its end.
        assert_eq!((&ours).read(&mut [0; 8]).unwrap(), 0);
        // Logging works without it.
        rig.run(0);
        rig.set_log_base();
        rig.set_log_all(true);
        assert_eq!(rig.calls.take(), [Call::SetDirtyLog(true)]);
    });
}
