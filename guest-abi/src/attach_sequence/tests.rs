use super::*;

const ARM: Option<RequestType> = Some(RequestType::Arm);
const ATTACH: Option<RequestType> = Some(RequestType::Attach);

/// The verdicts for entries that come one after another.
fn verdicts<const N: usize>(queue: u16, entries: [(Option<RequestType>, u16); N]) -> [Verdict; N] {
    let mut sequence = AttachSequence::new(queue);
    entries.map(|(entry, in_flight)| sequence.take(entry, in_flight))
}

#[test]
fn attach_follows_arm_or_comes_first() {
    assert_eq!(verdicts(1, [(None, 0), (ARM, 0), (ATTACH, 0)]), [Verdict::Execute; 3]);
    assert_eq!(verdicts(1, [(ATTACH, 0)]), [Verdict::Execute]);
    let refused = Verdict::Refuse(ErrorCode::Order);
    assert_eq!(verdicts(1, [(None, 0), (ATTACH, 0)]), [Verdict::Execute, refused]);
    assert_eq!(verdicts(1, [(ARM, 0), (None, 0), (ATTACH, 0)]), [Verdict::Execute, Verdict::Execute, refused]);
}

#[test]
fn a_queue_with_requests_in_flight_is_neither_armed_nor_attached() {
    let refused = Verdict::Refuse(ErrorCode::Order);
    assert_eq!(verdicts(1, [(None, 0), (ARM, 1), (ATTACH, 0)]), [Verdict::Execute, refused, refused]);
    assert_eq!(verdicts(1, [(ATTACH, 1)]), [refused]);
}

#[test]
fn no_entry_may_follow_attach() {
    for behind in [None, ARM, ATTACH, Some(RequestType::Event)] {
        let verdicts = verdicts(1, [(ATTACH, 0), (behind, 0), (None, 0)]);
        assert_eq!(verdicts, [Verdict::Execute, Verdict::Break, Verdict::Break]);
    }
}

#[test]
fn a_queue_is_ordinary_again_after_attach_was_completed() {
    let mut sequence = AttachSequence::new(1);
    sequence.take(ARM, 0);
    sequence.take(ATTACH, 0);
    assert!(sequence.is_attached());
    sequence.attach_completed();
    assert!(!sequence.is_attached());
    assert_eq!(
        [(None, 0), (ARM, 0), (ATTACH, 0)].map(|(entry, busy)| sequence.take(entry, busy)),
        [Verdict::Execute; 3]
    );
}

#[test]
fn queue_0_is_never_attached_and_takes_only_the_other_requests() {
    let refused = Verdict::Refuse(ErrorCode::Queue);
    for request in RequestType::ALL {
        let is_for_others = matches!(request, RequestType::Arm | RequestType::Attach);
        let [on_0] = verdicts(0, [(Some(request), 0)]);
        let [on_1] = verdicts(1, [(Some(request), 0)]);
        assert_eq!((on_0 == refused, on_1 == refused), (is_for_others, !is_for_others), "{request:?}");
    }
}
