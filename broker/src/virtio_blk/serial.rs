//! The device's name, which the guest sees as the disk's serial number.

use std::str::FromStr;

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The device ID string of `VIRTIO_BLK_T_GET_ID` (VIRTIO 1.2, 5.2.6): up to 20 printable ASCII characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Serial([u8; ID_BYTES]);

impl Serial {
    /// The bytes that the driver gets: padded with zeroes, and without a zero at the end if there are 20 characters.
    pub fn as_bytes(&self) -> &[u8; ID_BYTES] {
        &self.0
    }
}

impl FromStr for Serial {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, SerialError> {
        if let Some(character) = text.chars().find(|character| !matches!(character, ' '..='~')) {
            return Err(SerialError::Character { serial: text.to_owned(), character });
        }
        let mut bytes = [0; ID_BYTES];
        let place = bytes
            .get_mut(..text.len())
            .ok_or_else(|| SerialError::TooLong { serial: text.to_owned(), characters: text.len() })?;
        place.copy_from_slice(text.as_bytes());
        Ok(Self(bytes))
    }
}

/// Why a text cannot be a serial number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SerialError {
    /// The text has more than 20 characters.
    #[error("the serial number {serial:?} has {characters} characters; virtio-blk has room for {ID_BYTES}")]
    TooLong {
        /// The text.
        serial: String,
        /// Number of characters.
        characters: usize,
    },
    /// The text has a character that is not printable ASCII.
    #[error("the serial number {serial:?} has the character {character:?}; use printable ASCII only")]
    Character {
        /// The text.
        serial: String,
        /// The first such character.
        character: char,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_serial_is_padded_with_zeroes() {
        let serial: Serial = "disk-7".parse().unwrap();
        assert_eq!(serial.as_bytes(), b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn a_serial_of_twenty_characters_has_no_zero_at_its_end() {
        let serial: Serial = "01234567890123456789".parse().unwrap();
        assert_eq!(serial.as_bytes(), b"01234567890123456789");
    }

    #[test]
    fn a_serial_of_twenty_one_characters_is_refused() {
        let refused = "012345678901234567890".parse::<Serial>().unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the serial number \"012345678901234567890\" has 21 characters; virtio-blk has room for 20"
        );
    }

    #[test]
    fn a_serial_that_is_not_printable_ascii_is_refused() {
        assert_eq!(
            "a\0b".parse::<Serial>().unwrap_err().to_string(),
            "the serial number \"a\\0b\" has the character '\\0'; use printable ASCII only"
        );
        assert!("straße".parse::<Serial>().is_err());
    }
}
