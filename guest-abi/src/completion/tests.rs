use proptest::prelude::*;

use super::*;

const AGAIN: Completed = Completed::Again { done_bytes: 0 };

#[test]
fn errors_of_the_storage_are_final_also_those_of_a_durable_write() {
    // EIO, ENXIO, ENODEV, EINVAL, EFBIG, ENOSPC, EROFS, ENODATA, EILSEQ, EOPNOTSUPP, ETIMEDOUT, EREMOTEIO, EACCES, EBUSY
    for errno in [5, 6, 19, 22, 27, 28, 30, 61, 84, 95, 110, 121, 13, 16] {
        assert_eq!(Completed::of(-errno, 4096), Completed::Failed { errno });
    }
}

#[test]
fn errors_of_the_ring_or_of_a_dying_process_send_the_request_to_queue_0() {
    for res in [-4, -11, -12, -14, -125] {
        assert_eq!(Completed::of(res, 4096), AGAIN, "{res}");
    }
}

#[test]
fn a_short_transfer_is_not_done_and_a_longer_one_than_asked_for_is_an_error() {
    assert_eq!(Completed::of(4096, 4096), Completed::Done);
    assert_eq!(Completed::of(512, 4096), Completed::Again { done_bytes: 512 });
    assert_eq!(Completed::of(0, 4096), AGAIN);
    assert_eq!(Completed::of(4097, 4096), Completed::Failed { errno: EIO });
    assert_eq!(Completed::of(i32::MAX, 4096), Completed::Failed { errno: EIO });
    assert_eq!(Completed::of(i32::MIN, 4096), Completed::Failed { errno: EIO });
}

#[test]
fn of_several_sqes_an_error_counts_before_again_and_again_before_done() {
    let failed = Completed::Failed { errno: 28 };
    let part = Completed::Again { done_bytes: 512 };
    for (results, expected) in [
        ([Completed::Done, Completed::Done], Completed::Done),
        ([part, Completed::Done], AGAIN),
        ([part, failed], failed),
        ([Completed::Done, failed], failed),
    ] {
        let [one, other] = results;
        assert_eq!((one.and(other), other.and(one)), (expected, expected));
    }
}

proptest! {
    #[test]
    fn no_result_makes_a_driver_count_more_bytes_than_it_asked_for(res: i32, len_bytes: u32) {
        match Completed::of(res, len_bytes) {
            Completed::Done => prop_assert_eq!(res as u32, len_bytes),
            Completed::Again { done_bytes } => prop_assert!(done_bytes < len_bytes || res < 0 && done_bytes == 0),
            Completed::Failed { errno } => prop_assert!(errno > 0),
        }
    }
}
