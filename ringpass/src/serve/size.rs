//! Sizes with units, as options.

/// A number of bytes, or of KiB, MiB, GiB or TiB with one of the letters K, M, G and T.
pub(super) fn size_bytes(text: &str) -> Result<u64, String> {
    let shift = |letter| "KMGT".find(letter).map(|index| 10 * (index + 1));
    let (digits, shift) = match text.chars().next_back().and_then(shift) {
        Some(shift) => (&text[..text.len() - 1], shift),
        None => (text, 0),
    };
    let is_number = !digits.starts_with('+');
    let number = digits.parse::<u64>().ok().filter(|number| is_number && *number > 0);
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "must be a number of bytes, or a number with K, M, G or T, such as 64G".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!([size_bytes("512"), size_bytes("3K"), size_bytes("64G")], [Ok(512), Ok(3 << 10), Ok(64 << 30)]);
        for bad in ["", "G", "0", "+1", "-1", "1g", "1.5G", "1GB", "99999999T"] {
            assert!(size_bytes(bad).unwrap_err().contains("such as 64G"), "{bad}");
        }
    }
}
