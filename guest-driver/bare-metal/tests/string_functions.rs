//! Compares the guest program's own string functions with Rust's.
#![cfg(target_arch = "x86_64")]

#[path = "../src/program/strings.rs"]
#[macro_use]
mod strings;

string_functions!("guest_");

unsafe extern "C" {
    fn guest_memcpy(destination: *mut u8, source: *const u8, len: usize) -> *mut u8;
    fn guest_memmove(destination: *mut u8, source: *const u8, len: usize) -> *mut u8;
    fn guest_memset(destination: *mut u8, value: i32, len: usize) -> *mut u8;
    fn guest_memcmp(left: *const u8, right: *const u8, len: usize) -> i32;
    fn guest_bcmp(left: *const u8, right: *const u8, len: usize) -> i32;
}

/// Bytes that differ from their neighbours.
fn pattern() -> [u8; 64] {
    std::array::from_fn(|index| (index * 37 + 11) as u8)
}

fn compare(left: &[u8], right: &[u8]) -> i32 {
    assert_eq!(left.len(), right.len());
    // SAFETY: both are readable for that many bytes.
    unsafe { guest_memcmp(left.as_ptr(), right.as_ptr(), left.len()) }
}

#[test]
fn memcmp_has_the_sign_of_the_first_bytes_that_differ() {
    for (left, right) in [
        (&b""[..], &b""[..]),
        (b"a", b"a"),
        (b"a", b"b"),
        (b"b", b"a"),
        // Bytes are unsigned.
        (b"\x7f", b"\x80"),
        (b"\xff", b"\x00"),
        // Bytes after the first difference do not count.
        (b"abcz", b"abda"),
        (b"abda", b"abcz"),
    ] {
        assert_eq!(compare(left, right).cmp(&0), left.cmp(right), "{left:?} against {right:?}");
    }
}

#[test]
fn memcmp_and_bcmp_compare_exactly_the_given_length() {
    let left = pattern();
    for len in 0..left.len() {
        for changed in 0..left.len() {
            let mut right = left;
            right[changed] ^= 0x80;
            assert_eq!(compare(&left[..len], &right[..len]) == 0, changed >= len, "byte {changed} of {len}");
            // SAFETY: both are readable for `len` bytes.
            let differ = unsafe { guest_bcmp(left.as_ptr(), right.as_ptr(), len) };
            assert_eq!(differ == 0, changed >= len, "byte {changed} of {len}");
        }
    }
}

#[test]
fn memmove_moves_overlapping_bytes_in_both_directions() {
    const LEN_MAX: usize = 24;
    for from in 0..=40 {
        for to in 0..=40 {
            for len in 0..=LEN_MAX {
                let (mut moved, mut expected) = (pattern(), pattern());
                expected.copy_within(from..from + len, to);
                let bytes = moved.as_mut_ptr();
                // SAFETY: the source lies in the array.
                let source = unsafe { bytes.add(from) };
                // SAFETY: the destination lies in the array.
                let destination = unsafe { bytes.add(to) };
                // SAFETY: both lie in the array with `len` bytes.
                let returned = unsafe { guest_memmove(destination, source, len) };
                assert_eq!(moved, expected, "{len} bytes from {from} to {to}");
                assert_eq!(returned, destination);
            }
        }
    }
}

#[test]
fn memcpy_and_memset_write_exactly_their_bytes() {
    let source = pattern();
    for len in 0..source.len() {
        let (mut copied, mut filled) = ([0xee; 64], [0xee; 64]);
        // SAFETY: both have `len` bytes, and they are two arrays.
        let returned = unsafe { guest_memcpy(copied.as_mut_ptr(), source.as_ptr(), len) };
        assert_eq!(returned, copied.as_mut_ptr());
        assert_eq!(copied[..len], source[..len]);
        assert!(copied[len..].iter().all(|byte| *byte == 0xee));
        // Only the low byte of the value counts.
        // SAFETY: the array has `len` bytes.
        let returned = unsafe { guest_memset(filled.as_mut_ptr(), 0x142, len) };
        assert_eq!(returned, filled.as_mut_ptr());
        assert!(filled[..len].iter().all(|byte| *byte == 0x42));
        assert!(filled[len..].iter().all(|byte| *byte == 0xee));
    }
}
