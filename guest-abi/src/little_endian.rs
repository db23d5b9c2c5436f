//! The integers of shared structures: little-endian on every machine.

use core::fmt;

macro_rules! little_endian {
    ($name:ident, $native:ident, $c_name:literal) => {
        #[doc = concat!("A little-endian `", stringify!($native), "`; `", $c_name, "` in C.")]
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        #[repr(transparent)]
        pub struct $name($native);

        impl $name {
            /// Converts a native value to little-endian.
            pub const fn new(value: $native) -> Self {
                Self(value.to_le())
            }

            /// The value in this machine's byte order.
            pub const fn get(self) -> $native {
                $native::from_le(self.0)
            }
        }

        impl From<$native> for $name {
            fn from(value: $native) -> Self {
                Self::new(value)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.get())
            }
        }

        impl Field for $name {
            fn put(&self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.0.to_ne_bytes());
            }

            fn take(bytes: &[u8]) -> Self {
                let mut array = [0; size_of::<Self>()];
                array.copy_from_slice(bytes);
                Self($native::from_ne_bytes(array))
            }
        }
    };
}

little_endian!(Le16, u16, "__le16");
little_endian!(Le32, u32, "__le32");
little_endian!(Le64, u64, "__le64");

/// A field of a shared structure. The slices have exactly the length of the field.
pub(crate) trait Field {
    fn put(&self, bytes: &mut [u8]);
    fn take(bytes: &[u8]) -> Self;
}

impl<F: Field, const N: usize> Field for [F; N] {
    fn put(&self, bytes: &mut [u8]) {
        for (field, bytes) in self.iter().zip(bytes.chunks_exact_mut(size_of::<F>())) {
            field.put(bytes);
        }
    }

    fn take(bytes: &[u8]) -> Self {
        core::array::from_fn(|index| F::take(&bytes[index * size_of::<F>()..][..size_of::<F>()]))
    }
}

/// Implements the conversion of a `repr(C)` structure from and to bytes. A missing field or padding is a compile error.
macro_rules! wire {
    ($name:ident { $($field:ident),* $(,)? }) => {
        impl $name {
            /// Length of the structure in bytes.
            pub const BYTES: usize = size_of::<Self>();

            /// Encodes the structure as bytes.
            pub fn to_bytes(&self) -> [u8; Self::BYTES] {
                let mut bytes = [0; Self::BYTES];
                $crate::little_endian::Field::put(self, &mut bytes);
                bytes
            }

            /// Decodes the structure. Any bytes are valid: nothing is checked.
            pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
                $crate::little_endian::Field::take(bytes)
            }
        }

        impl $crate::little_endian::Field for $name {
            fn put(&self, bytes: &mut [u8]) {
                let Self { $($field),* } = self;
                let mut at = 0;
                $(
                    $crate::little_endian::Field::put($field, &mut bytes[at..at + size_of_val($field)]);
                    at += size_of_val($field);
                )*
                let _end = at;
            }

            fn take(bytes: &[u8]) -> Self {
                Self { $($field: $crate::little_endian::Field::take(
                    &bytes[core::mem::offset_of!(Self, $field)..][..$crate::little_endian::width(|s: &Self| &s.$field)],
                )),* }
            }
        }

        const _: () = assert!(
            size_of::<$name>() == 0 $(+ $crate::little_endian::width(|s: &$name| &s.$field))*,
            "padding in a shared structure"
        );
    };
}
pub(crate) use wire;

/// Size in bytes of the field that the function selects.
pub(crate) const fn width<S, F>(_field: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_is_the_least_significant() {
        let mut bytes = [0; 4];
        Le32::new(0x0102_0304).put(&mut bytes);
        assert_eq!(bytes, [4, 3, 2, 1]);
        assert_eq!(Le32::take(&bytes).get(), 0x0102_0304);
    }
}
