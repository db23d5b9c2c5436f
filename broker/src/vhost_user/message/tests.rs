//! Every request in its valid form, and the messages that the parser refuses.

use proptest::prelude::*;
use vhost::vhost_user::message::FrontendReq as Code;

use super::*;
use crate::fuzzing::save_seed;

fn header(request: u32, flags: u32, size_bytes: u32) -> [u8; HEADER_BYTES] {
    let words = [request, flags, size_bytes].map(u32::to_ne_bytes);
    words.as_flattened().try_into().unwrap()
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

fn halves(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// Each request in its valid form: code, body, number of descriptors, parsed request.
fn valid_forms() -> Vec<(Code, Vec<u8>, usize, Request)> {
    let region = RegionDescription { gpa: 1, size_bytes: 2, user_address: 3, file_offset_bytes: 4 };
    let other = RegionDescription { gpa: 5, size_bytes: 6, user_address: 7, file_offset_bytes: 8 };
    let address = VringAddress { index: 2, desc_table: 0x10, used_ring: 0x24, avail_ring: 0x32, used_log_gpa: None };
    let logged = VringAddress { used_log_gpa: Some(9), ..address };
    let inflight =
        InflightDescription { size_bytes: 11, offset_bytes: 12, queues: 13, queue_size: 14, is_padded: false };
    let inflight_body = [numbers(&[11, 12]), vec![13, 0, 14, 0]].concat();
    let padded = InflightDescription { is_padded: true, ..inflight };
    let with_fd = VringFile { index: 255, has_fd: true };
    let without_fd = VringFile { index: 7, has_fd: false };
    let get_config = Request::GetConfig { offset_bytes: 4, size_bytes: 2, flags: 1 };
    let set_config = Request::SetConfig { offset_bytes: 4, flags: 1, bytes: vec![8, 9] };
    vec![
        (Code::GET_FEATURES, vec![], 0, Request::GetFeatures),
        (Code::SET_FEATURES, numbers(&[5]), 0, Request::SetFeatures { features: 5 }),
        (Code::SET_OWNER, vec![], 0, Request::SetOwner),
        (Code::RESET_OWNER, vec![], 0, Request::ResetOwner),
        (Code::SET_MEM_TABLE, halves(&[0, 0]), 0, Request::SetMemTable { regions: vec![] }),
        (
            Code::SET_MEM_TABLE,
            [halves(&[2, 0xdead]), numbers(&[1, 2, 3, 4, 5, 6, 7, 8])].concat(),
            2,
            Request::SetMemTable { regions: vec![region, other] },
        ),
        (Code::SET_LOG_BASE, numbers(&[8, 9]), 1, Request::SetLogBase { size_bytes: 8, offset_bytes: 9 }),
        (Code::SET_LOG_FD, vec![], 1, Request::SetLogFd),
        (Code::SET_VRING_NUM, halves(&[1, 2]), 0, Request::SetVringNum { index: 1, size: 2 }),
        (
            Code::SET_VRING_ADDR,
            [halves(&[2, 0]), numbers(&[0x10, 0x24, 0x32, 9])].concat(),
            0,
            Request::SetVringAddr(address),
        ),
        (
            Code::SET_VRING_ADDR,
            [halves(&[2, 1]), numbers(&[0x10, 0x24, 0x32, 9])].concat(),
            0,
            Request::SetVringAddr(logged),
        ),
        (Code::SET_VRING_BASE, halves(&[1, 0xffff]), 0, Request::SetVringBase { index: 1, next_avail: 0xffff }),
        (Code::GET_VRING_BASE, halves(&[1, 77]), 0, Request::GetVringBase { index: 1 }),
        (Code::SET_VRING_KICK, numbers(&[0xff]), 1, Request::SetVringKick(with_fd)),
        (Code::SET_VRING_CALL, numbers(&[0x107]), 0, Request::SetVringCall(without_fd)),
        (Code::SET_VRING_ERR, numbers(&[0xff]), 1, Request::SetVringErr(with_fd)),
        (Code::GET_PROTOCOL_FEATURES, vec![], 0, Request::GetProtocolFeatures),
        (Code::SET_PROTOCOL_FEATURES, numbers(&[5]), 0, Request::SetProtocolFeatures { features: 5 }),
        (Code::GET_QUEUE_NUM, vec![], 0, Request::GetQueueNum),
        (Code::SET_VRING_ENABLE, halves(&[3, 1]), 0, Request::SetVringEnable { index: 3, is_enabled: true }),
        (Code::SET_VRING_ENABLE, halves(&[3, 0]), 0, Request::SetVringEnable { index: 3, is_enabled: false }),
        (Code::SET_BACKEND_REQ_FD, vec![], 1, Request::SetBackendReqFd),
        (Code::GET_CONFIG, halves(&[4, 2, 1]), 0, get_config.clone()),
        (Code::GET_CONFIG, [halves(&[4, 2, 1]), vec![0, 0]].concat(), 0, get_config),
        (Code::SET_CONFIG, [halves(&[4, 2, 1]), vec![8, 9]].concat(), 0, set_config),
        (Code::GET_INFLIGHT_FD, inflight_body.clone(), 0, Request::GetInflightFd(inflight)),
        (Code::SET_INFLIGHT_FD, [inflight_body, vec![1; 4]].concat(), 1, Request::SetInflightFd(padded)),
        (Code::RESET_DEVICE, vec![], 0, Request::ResetDevice),
        (Code::GET_MAX_MEM_SLOTS, vec![], 0, Request::GetMaxMemSlots),
        (Code::ADD_MEM_REG, numbers(&[99, 1, 2, 3, 4]), 1, Request::AddMemReg(region)),
        (Code::REM_MEM_REG, numbers(&[99, 1, 2, 3, 4]), 0, Request::RemMemReg(region)),
        (Code::REM_MEM_REG, numbers(&[99, 1, 2, 3, 4]), 1, Request::RemMemReg(region)),
        (Code::SET_STATUS, numbers(&[0xff]), 0, Request::SetStatus { status: 0xff }),
        (Code::GET_STATUS, vec![], 0, Request::GetStatus),
    ]
}

#[test]
fn every_request_parses_in_its_valid_form() {
    for (number, (code, body, fds, expected)) in (0..).zip(valid_forms()) {
        assert_eq!(Request::parse(code.into(), &body, fds), Ok(expected), "{code:?}");
        let header = header(code.into(), 1, body.len() as u32);
        save_seed("vhost_user_message", &format!("{number}-{code:?}"), &[&header[..], &[fds as u8], &body].concat());
    }
}

#[test]
fn no_request_parses_with_a_body_of_the_wrong_size() {
    for (code, body, fds, _) in valid_forms() {
        let sizes_of_code: Vec<usize> =
            valid_forms().into_iter().filter(|form| form.0 == code).map(|form| form.1.len()).collect();
        // The count in a table decides its size.
        let is_right = |size: &usize| match code {
            Code::SET_MEM_TABLE => *size == body.len(),
            Code::GET_INFLIGHT_FD | Code::SET_INFLIGHT_FD => [20, 24].contains(size),
            _ => sizes_of_code.contains(size),
        };
        for size in (0..body.len() + 40).filter(|size| !is_right(size)) {
            let mut other = body.clone();
            other.resize(size, 0);
            let error = Request::parse(code.into(), &other, fds).expect_err("a wrong size");
            assert!(matches!(error, MessageError::BodySize { .. }), "{code:?} with {size} bytes: {error}");
        }
    }
}

#[test]
fn no_request_parses_with_the_wrong_number_of_descriptors() {
    for (code, body, fds, _) in valid_forms() {
        for other in (0..5).filter(|other| *other != fds && !(code == Code::REM_MEM_REG && *other < 2)) {
            let error = Request::parse(code.into(), &body, other).expect_err("a wrong number of descriptors");
            assert!(matches!(error, MessageError::FdCount { .. }), "{code:?} with {other}: {error}");
        }
    }
}

#[test]
fn fields_that_are_never_valid_are_refused() {
    let table = |count| [halves(&[count, 0]), vec![0; 96]].concat();
    let cases: [(Code, Vec<u8>, &str); 9] = [
        (Code::SET_VRING_ENABLE, halves(&[0, 2]), "invalid value 0x2 of the state of a ring"),
        (Code::SET_VRING_BASE, halves(&[0, 0x1_0000]), "invalid value 0x10000 of the index of a split ring"),
        (Code::SET_VRING_KICK, numbers(&[0x200]), "invalid value 0x200 of vring and flag"),
        (Code::SET_VRING_CALL, numbers(&[1 << 63]), "invalid value 0x8000000000000000 of vring and flag"),
        (Code::SET_VRING_ADDR, [halves(&[0, 2]), vec![0; 32]].concat(), "invalid value 0x2 of flags"),
        (Code::SET_MEM_TABLE, table(254), "invalid value 0xfe of the number of regions"),
        (Code::SET_MEM_TABLE, table(u32::MAX), "invalid value 0xffffffff of the number of regions"),
        (Code::SET_MEM_TABLE, table(4), "a body of 104 bytes instead of 8 and 32 for each region"),
        (Code::SET_STATUS, numbers(&[0x100]), "invalid value 0x100 of the device status"),
    ];
    for (code, body, expected) in cases {
        let error = Request::parse(code.into(), &body, 0).expect_err("an invalid field").to_string();
        assert_eq!(error, expected, "{code:?}");
    }
}

/// The session, not the parser, judges what the driver chose.
#[test]
fn ring_addresses_and_configuration_offsets_may_have_any_value() {
    let address = VringAddress { index: 0, desc_table: 1, used_ring: 2, avail_ring: 3, used_log_gpa: None };
    let body = [halves(&[0, 0]), numbers(&[1, 2, 3, 0])].concat();
    assert_eq!(Request::parse(Code::SET_VRING_ADDR.into(), &body, 0), Ok(Request::SetVringAddr(address)));
    let (offset_bytes, size_bytes, flags) = (u32::MAX, u32::MAX, 0);
    let asked = Request::parse(Code::GET_CONFIG.into(), &halves(&[offset_bytes, size_bytes, flags]), 0);
    assert_eq!(asked, Ok(Request::GetConfig { offset_bytes, size_bytes, flags }));
}

#[test]
fn a_header_is_parsed() {
    let parsed = Header::parse(header(77, 0b1001, 40));
    assert_eq!(parsed, Ok(Header { request: 77, needs_reply: true, body_bytes: 40 }));
    assert!(!Header::parse(header(77, 0b0001, 40)).unwrap().needs_reply);
}

#[test]
fn an_invalid_header_is_refused() {
    let cases = [
        (header(1, 0b0000, 0), "message 1: version 0 of vhost-user; only version 1 exists"),
        (header(1, 0b0010, 0), "message 1: version 2 of vhost-user; only version 1 exists"),
        (header(1, 0b0101, 0), "message 1 is marked as a reply, but the back-end has asked for none"),
        (header(1, 0b1_0001, 0), "message 1: flags 0x11 have unknown bits"),
        (header(1, 0b0001, 8193), "message 1 announces 8193 bytes; the back-end reads at most 8192"),
        (header(1, 0b0001, u32::MAX), "message 1 announces 4294967295 bytes; the back-end reads at most 8192"),
    ];
    for (bytes, expected) in cases {
        assert_eq!(Header::parse(bytes).unwrap_err().to_string(), expected);
    }
}

#[test]
fn the_largest_table_fits_into_a_message() {
    let regions = MAX_FDS as u32;
    let body = [halves(&[regions, 0]), vec![0; MAX_FDS * 32]].concat();
    assert!(body.len() <= MAX_BODY_BYTES);
    assert!(Request::parse(Code::SET_MEM_TABLE.into(), &body, MAX_FDS).is_ok());
}

#[test]
fn a_reply_has_exactly_the_header_that_qemu_compares() {
    let reply = Reply::number(11, 0x1234);
    assert_eq!(reply.to_bytes(), [halves(&[11, 5, 8]), numbers(&[0x1234])].concat());
}

proptest! {
    #[test]
    fn arbitrary_bodies_parse_or_are_refused(request in 0_u32..50, body in prop::collection::vec(any::<u8>(), 0..200), fds in 0_usize..4) {
        // Only checks that the parser does not panic: the tables above say what is valid.
        let _ = Request::parse(request, &body, fds);
    }

    #[test]
    fn arbitrary_headers_parse_or_are_refused(bytes in any::<[u8; HEADER_BYTES]>()) {
        if let Ok(header) = Header::parse(bytes) {
            prop_assert!(header.body_bytes <= MAX_BODY_BYTES);
        }
    }
}
