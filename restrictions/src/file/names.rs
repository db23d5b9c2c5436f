//! Lists of names of operations and flags in policy files.

use core::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, SeqAccess, Visitor},
    ser::SerializeSeq,
};

use crate::{
    accept::Accepted,
    fields::{Attributes, IoPrioClasses, RwFlags},
    operation::{Operation, RegisterOperation},
    sqe::SqeFlags,
};

/// An item that policy files write by name.
pub(super) trait Named: Copy {
    /// The kind of the items, for error messages.
    const WHAT: &'static str;
    fn from_name(name: &str) -> Option<Self>;
    /// For items without a name. `None`: out of range.
    fn from_number(number: i64) -> Option<Self>;
    fn entry(self) -> Entry;
}

/// An item as it is written in a file.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Entry {
    Name(String),
    Number(u64),
}

/// A list of names.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Names<T>(pub(super) Vec<T>);

impl<T> Names<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T> Default for Names<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Named> Serialize for Names<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        self.0.iter().try_for_each(|item| list.serialize_element(&item.entry()))?;
        list.end()
    }
}

impl<'de, T: Named> Deserialize<'de> for Names<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List<T>(PhantomData<T>);

        impl<'de, T: Named> Visitor<'de> for List<T> {
            type Value = Names<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of {}s", T::WHAT)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut items = Vec::new();
                while let Some(One(item)) = list.next_element()? {
                    items.push(item);
                }
                Ok(Names(items))
            }
        }

        deserializer.deserialize_seq(List(PhantomData))
    }
}

/// `what` with its indefinite article. SQE is read letter by letter.
fn with_article(what: &str) -> String {
    let is_vowel_first = what.starts_with(['a', 'e', 'i', 'o', 'u']) || what.starts_with("SQE");
    format!("{} {what}", if is_vowel_first { "an" } else { "a" })
}

/// One item of a list.
struct One<T>(T);

impl<'de, T: Named> Deserialize<'de> for One<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Item<T>(PhantomData<T>);

        impl<T: Named> Visitor<'_> for Item<T> {
            type Value = One<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "the name of {}, or its number", with_article(T::WHAT))
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
                T::from_name(name).map(One).ok_or_else(|| E::custom(format_args!("{name:?} is no known {}", T::WHAT)))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
                let item = T::from_number(number);
                item.map(One)
                    .ok_or_else(|| E::custom(format_args!("{number} is not the number of {}", with_article(T::WHAT))))
            }
        }

        deserializer.deserialize_any(Item(PhantomData))
    }
}

macro_rules! named_codes {
    ($Type:ident, $what:literal) => {
        impl Named for $Type {
            const WHAT: &'static str = $what;

            fn from_name(name: &str) -> Option<Self> {
                Self::from_name(name)
            }

            fn from_number(number: i64) -> Option<Self> {
                u8::try_from(number).ok().map(Self::new)
            }

            fn entry(self) -> Entry {
                self.name().map_or(Entry::Number(self.code().into()), |name| Entry::Name(name.to_owned()))
            }
        }
    };
}

named_codes!(Operation, "SQE operation");
named_codes!(RegisterOperation, "register operation");

impl Named for Accepted {
    const WHAT: &'static str = "acceptable lint error";

    fn from_name(name: &str) -> Option<Self> {
        Self::from_lint_name(name)
    }

    fn from_number(_: i64) -> Option<Self> {
        None
    }

    fn entry(self) -> Entry {
        Entry::Name(self.to_string())
    }
}

/// The flags of a set, one by one; all bits without a name as one number.
pub(super) fn each_flag<T: bitflags::Flags + Copy>(flags: T) -> Names<T> {
    Names(flags.iter().collect())
}

pub(super) fn all_flags<T: bitflags::Flags + Copy>(names: &Names<T>) -> T {
    names.0.iter().fold(T::empty(), |all, &flag| all.union(flag))
}

macro_rules! named_flags {
    ($Type:ident, $Bits:ident, $what:literal, [$($name:literal = $flag:ident),+ $(,)?]) => {
        impl Named for $Type {
            const WHAT: &'static str = $what;

            fn from_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$flag),)+
                    _ => None,
                }
            }

            fn from_number(number: i64) -> Option<Self> {
                $Bits::try_from(number).ok().map(Self::from_bits_retain)
            }

            fn entry(self) -> Entry {
                match self {
                    $(Self::$flag => Entry::Name($name.to_owned()),)+
                    other => Entry::Number(other.bits().into()),
                }
            }
        }
    };
}

named_flags!(
    SqeFlags,
    u8,
    "SQE flag",
    [
        "IOSQE_FIXED_FILE" = FIXED_FILE,
        "IOSQE_IO_DRAIN" = IO_DRAIN,
        "IOSQE_IO_LINK" = IO_LINK,
        "IOSQE_IO_HARDLINK" = IO_HARDLINK,
        "IOSQE_ASYNC" = ASYNC,
        "IOSQE_BUFFER_SELECT" = BUFFER_SELECT,
        "IOSQE_CQE_SKIP_SUCCESS" = CQE_SKIP_SUCCESS,
    ]
);
named_flags!(
    RwFlags,
    u32,
    "read/write flag",
    [
        "RWF_HIPRI" = HIPRI,
        "RWF_DSYNC" = DSYNC,
        "RWF_SYNC" = SYNC,
        "RWF_NOWAIT" = NOWAIT,
        "RWF_APPEND" = APPEND,
        "RWF_NOAPPEND" = NOAPPEND,
        "RWF_ATOMIC" = ATOMIC,
        "RWF_DONTCACHE" = DONTCACHE,
    ]
);
named_flags!(
    IoPrioClasses,
    u8,
    "priority class",
    ["none" = NONE, "realtime" = REALTIME, "best-effort" = BEST_EFFORT, "idle" = IDLE,]
);
named_flags!(Attributes, u64, "read/write attribute", ["IORING_RW_ATTR_FLAG_PI" = PI]);
