use proptest::prelude::*;

use super::*;

#[test]
fn numbers_differ_in_more_than_the_bits_that_devices_ignore() {
    const IGNORED: u32 = 1 << 31 | 1;
    let standard = [0, 1, 2, 3, 4, 8, 10, 11, 13, 14, 15, 16, 18, 20, 22, 24, 26];
    for request in RequestType::ALL {
        assert!(standard.iter().all(|other| (request.number() ^ other) & !IGNORED != 0), "{request:?}");
        let others = RequestType::ALL.into_iter().filter(|other| *other != request);
        assert!(others.into_iter().all(|other| (request.number() ^ other.number()) & !IGNORED != 0), "{request:?}");
        assert_eq!(request.number() & 1 == 1, request.payload_bytes() != 0, "{request:?}");
    }
}

#[test]
fn every_code_has_its_number_and_the_next_one_is_unknown() {
    for (number, code) in (0..).zip(ErrorCode::ALL) {
        assert_eq!((code as u32, ErrorCode::from_number(number)), (number, Some(code)));
    }
    assert_eq!(ErrorCode::from_number(ErrorCode::ALL.len() as u32), None);
}

#[test]
fn every_code_says_when_to_ask_again() {
    let codes = |retry: Retry| -> std::vec::Vec<_> {
        ErrorCode::ALL.into_iter().filter(|code| code.retry() == retry).collect()
    };
    assert_eq!(codes(Retry::Event), [ErrorCode::Mode, ErrorCode::Cost]);
    assert_eq!(codes(Retry::Later), [ErrorCode::Busy, ErrorCode::Resources]);
    let probe = [ErrorCode::Version, ErrorCode::Features, ErrorCode::Entries, ErrorCode::Alignment];
    assert_eq!(codes(Retry::Probe), probe);
}

proptest! {
    #[test]
    fn a_payload_is_its_known_part_followed_by_zeroes(known: [u8; 8], zeroes in 0..64usize, tail in 0..64usize, byte: u8) {
        let mut bytes = std::vec::Vec::from(known);
        bytes.resize(8 + zeroes, 0);
        prop_assert_eq!(payload::<8>(&bytes), Ok(known));
        prop_assert_eq!(payload::<8>(&bytes[..tail.min(7)]), Err(ErrorCode::Length));
        bytes.push(byte);
        let expected = if byte == 0 { Ok(known) } else { Err(ErrorCode::Reserved) };
        prop_assert_eq!(payload::<8>(&bytes), expected);
    }
}

#[test]
fn a_payload_beyond_the_limit_is_refused_even_if_it_is_zero() {
    assert_eq!(payload::<8>(&[0; 4096]), Ok([0; 8]));
    assert_eq!(payload::<8>(&[0; 4097]), Err(ErrorCode::Length));
}
