//! Policy files in TOML.
//!
//! ```toml
//! version = 1
//! name = "direct-read-write"                      # optional, as is `description`
//! kernels = "auto"                                # or "before-linux-7.0", "from-linux-7.0"
//!
//! [sqe]
//! operations = ["IORING_OP_READ_FIXED", "IORING_OP_WRITE_FIXED"]
//! flags_required = ["IOSQE_FIXED_FILE"]
//! flags_allowed = ["IOSQE_FIXED_FILE"]
//!
//! [register]
//! operations = ["IORING_REGISTER_EVENTFD"]
//! operations_if_known = ["IORING_REGISTER_CLONE_BUFFERS"]
//!
//! [fields]                                        # every rule is optional; any makes the policy one for mediated mode
//! file_slots = { first = 0, last = 0 }
//! buffer_slots = { first = 0, last = 15 }
//! offset_window = { start_bytes = 0, len_bytes = 1073741824 }
//! length_bytes = { min = 512, max = 1048576 }
//! alignment_bytes = 512
//! rw_flags = ["RWF_DSYNC"]
//! ioprio_classes = ["none", "best-effort", "idle"]
//! attributes = []                                 # or ["IORING_RW_ATTR_FLAG_PI"]
//! max_outstanding = 256
//!
//! [lint]                                          # optional
//! accept = ["unbounded-work"]                     # errors of lint that the author of the policy has weighed
//! ```
//!
//! `lint.accept` takes `ordered-requests`, `unbounded-work`, `async-flag` and `completion-flood`
//! ([`Accepted`]): errors about guests that exhaust the host or hang their own ring. They become warnings. No policy
//! file can accept that a guest escapes.
//!
//! Operations and flags have the kernel's names. An operation or flag that this crate has no name for is written as its
//! number. The parser refuses unknown keys and names.

mod names;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::{
    accept::Accepted,
    fields::{
        ALIGNMENT_ODD, Attributes, FieldRules, IoPrioClasses, LENGTH_REVERSED, LengthRange, NONE_OUTSTANDING,
        OffsetWindow, RwFlags, SLOTS_REVERSED, Slots, WINDOW_EMPTY,
    },
    operation::{Operation, RegisterOperation},
    policy::{Policy, TargetSemantics},
    set::{OperationSet, RegisterOperationSet},
    sqe::SqeFlags,
    support::RestrictionSemantics,
};
use names::{Names, all_flags, each_flag};

/// The version of the format that this crate reads and writes.
const VERSION: u32 = 1;

/// A policy file: a policy with an optional name and description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyFile {
    /// The optional name.
    pub name: Option<String>,
    /// The optional description, a sentence.
    pub description: Option<String>,
    /// The policy.
    pub policy: Policy,
}

/// A mistake in a policy file, with its position.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
#[non_exhaustive]
pub struct FileError {
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// What is wrong at that position.
    pub message: String,
}

impl PolicyFile {
    /// Reads a policy file.
    ///
    /// # Errors
    ///
    /// The first mistake, with its position: invalid TOML, an unknown key, an unknown name, a value that cannot be
    /// intended, or a version of the format that this crate does not know.
    pub fn parse(text: &str) -> Result<Self, FileError> {
        let document: Document = toml::from_str(text).map_err(|error| {
            let (line, column) = place(text, error.span().map_or(0, |span| span.start));
            FileError { line, column, message: error.message().replace('\n', ", ") }
        })?;
        Ok(document.into())
    }

    /// Writes the policy as a file. [`parse`](Self::parse) reads the same policy back.
    ///
    /// # Panics
    ///
    /// Never for a policy without a [fault](FieldRules::fault) in its fields and with a window below 2^63 bytes, the
    /// limit of numbers in a file. Every policy that was read from a file meets both conditions.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(&Document::from(self)).expect("names, numbers below 2^63 and lists of them")
    }
}

/// Line and column of a byte, both counted from 1.
fn place(text: &str, byte: usize) -> (usize, usize) {
    let before = text.get(..byte).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(deserialize_with = "version")]
    version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    #[serde(default, skip_serializing_if = "Kernels::is_auto")]
    kernels: Kernels,
    sqe: SqeTable,
    register: RegisterTable,
    #[serde(default, skip_serializing_if = "FieldsTable::is_empty")]
    fields: FieldsTable,
    #[serde(default, skip_serializing_if = "LintTable::is_empty")]
    lint: LintTable,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq, Serialize)]
enum Kernels {
    #[default]
    #[serde(rename = "auto")]
    Auto,
    #[serde(rename = "before-linux-7.0")]
    BeforeLinux7,
    #[serde(rename = "from-linux-7.0")]
    FromLinux7,
}

impl Kernels {
    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct SqeTable {
    operations: Names<Operation>,
    flags_required: Names<SqeFlags>,
    flags_allowed: Names<SqeFlags>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RegisterTable {
    operations: Names<RegisterOperation>,
    #[serde(default, skip_serializing_if = "Names::is_empty")]
    operations_if_known: Names<RegisterOperation>,
}

#[derive(Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
struct FieldsTable {
    #[serde(default, deserialize_with = "slots", skip_serializing_if = "Option::is_none")]
    file_slots: Option<SlotsTable>,
    #[serde(default, deserialize_with = "slots", skip_serializing_if = "Option::is_none")]
    buffer_slots: Option<SlotsTable>,
    #[serde(default, deserialize_with = "window", skip_serializing_if = "Option::is_none")]
    offset_window: Option<WindowTable>,
    #[serde(default, deserialize_with = "length", skip_serializing_if = "Option::is_none")]
    length_bytes: Option<LengthTable>,
    #[serde(default, deserialize_with = "alignment", skip_serializing_if = "Option::is_none")]
    alignment_bytes: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rw_flags: Option<Names<RwFlags>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ioprio_classes: Option<Names<IoPrioClasses>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    attributes: Option<Names<Attributes>>,
    #[serde(default, deserialize_with = "outstanding", skip_serializing_if = "Option::is_none")]
    max_outstanding: Option<u32>,
}

impl FieldsTable {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct LintTable {
    accept: Names<Accepted>,
}

impl LintTable {
    fn is_empty(&self) -> bool {
        self.accept.is_empty()
    }
}

#[derive(Clone, Copy, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
struct SlotsTable {
    first: u32,
    last: u32,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
struct WindowTable {
    start_bytes: u64,
    len_bytes: u64,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
struct LengthTable {
    min: u32,
    max: u32,
}

fn version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        VERSION => Ok(VERSION),
        other => Err(de::Error::custom(format_args!("unknown format version {other}: use version {VERSION}"))),
    }
}

/// Refuses a bad value during parsing, while its position is known.
fn checked<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
    is_fine: impl FnOnce(&T) -> bool,
    complaint: &str,
) -> Result<Option<T>, D::Error> {
    let value = T::deserialize(deserializer)?;
    if is_fine(&value) { Ok(Some(value)) } else { Err(de::Error::custom(complaint)) }
}

fn slots<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SlotsTable>, D::Error> {
    checked(deserializer, |slots: &SlotsTable| slots.first <= slots.last, SLOTS_REVERSED)
}

fn window<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<WindowTable>, D::Error> {
    checked(deserializer, |window: &WindowTable| !OffsetWindow::from(*window).fault(), WINDOW_EMPTY)
}

fn length<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<LengthTable>, D::Error> {
    checked(deserializer, |length: &LengthTable| length.min <= length.max, LENGTH_REVERSED)
}

fn alignment<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    checked(deserializer, |alignment: &u32| alignment.is_power_of_two(), ALIGNMENT_ODD)
}

fn outstanding<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    checked(deserializer, |&outstanding: &u32| outstanding > 0, NONE_OUTSTANDING)
}

impl From<Document> for PolicyFile {
    fn from(document: Document) -> Self {
        let Document { version: _, name, description, kernels, sqe, register, fields, lint } = document;
        let register_operations: RegisterOperationSet = register.operations.0.into_iter().collect();
        let policy = Policy {
            operations: sqe.operations.0.into_iter().collect(),
            flags_allowed: all_flags(&sqe.flags_allowed),
            flags_required: all_flags(&sqe.flags_required),
            register_operations,
            register_operations_if_known: register.operations_if_known.0.into_iter().collect(),
            target: match kernels {
                Kernels::Auto => TargetSemantics::Auto,
                Kernels::BeforeLinux7 => TargetSemantics::Only(RestrictionSemantics::BeforeLinux7),
                Kernels::FromLinux7 => TargetSemantics::Only(RestrictionSemantics::FromLinux7),
            },
            fields: fields.into(),
            accepted: all_flags(&lint.accept),
        };
        Self { name, description, policy }
    }
}

impl From<&PolicyFile> for Document {
    fn from(file: &PolicyFile) -> Self {
        let policy = &file.policy;
        let operations = |set: OperationSet| Names(set.iter().collect());
        let register = |set: RegisterOperationSet| Names(set.iter().collect());
        Self {
            version: VERSION,
            name: file.name.clone(),
            description: file.description.clone(),
            kernels: match policy.target {
                TargetSemantics::Auto => Kernels::Auto,
                TargetSemantics::Only(RestrictionSemantics::BeforeLinux7) => Kernels::BeforeLinux7,
                TargetSemantics::Only(RestrictionSemantics::FromLinux7) => Kernels::FromLinux7,
            },
            sqe: SqeTable {
                operations: operations(policy.operations),
                flags_required: each_flag(policy.flags_required),
                flags_allowed: each_flag(policy.flags_allowed),
            },
            register: RegisterTable {
                operations: register(policy.register_operations),
                operations_if_known: register(policy.register_operations_if_known),
            },
            fields: policy.fields.into(),
            lint: LintTable { accept: each_flag(policy.accepted) },
        }
    }
}

impl From<WindowTable> for OffsetWindow {
    fn from(table: WindowTable) -> Self {
        Self { start_bytes: table.start_bytes, len_bytes: table.len_bytes }
    }
}

impl From<FieldsTable> for FieldRules {
    fn from(table: FieldsTable) -> Self {
        let slots = |slots: SlotsTable| Slots { first: slots.first, last: slots.last };
        Self {
            file_slots: table.file_slots.map(slots),
            buffer_slots: table.buffer_slots.map(slots),
            offset_window: table.offset_window.map(Into::into),
            length_bytes: table.length_bytes.map(|length| LengthRange { min: length.min, max: length.max }),
            alignment_bytes: table.alignment_bytes,
            rw_flags: table.rw_flags.as_ref().map(all_flags),
            ioprio_classes: table.ioprio_classes.as_ref().map(all_flags),
            attributes: table.attributes.as_ref().map(all_flags),
            max_outstanding: table.max_outstanding,
        }
    }
}

impl From<FieldRules> for FieldsTable {
    fn from(rules: FieldRules) -> Self {
        let slots = |slots: Slots| SlotsTable { first: slots.first, last: slots.last };
        Self {
            file_slots: rules.file_slots.map(slots),
            buffer_slots: rules.buffer_slots.map(slots),
            offset_window: (rules.offset_window)
                .map(|window| WindowTable { start_bytes: window.start_bytes, len_bytes: window.len_bytes }),
            length_bytes: rules.length_bytes.map(|length| LengthTable { min: length.min, max: length.max }),
            alignment_bytes: rules.alignment_bytes,
            rw_flags: rules.rw_flags.map(each_flag),
            ioprio_classes: rules.ioprio_classes.map(each_flag),
            attributes: rules.attributes.map(each_flag),
            max_outstanding: rules.max_outstanding,
        }
    }
}

#[cfg(test)]
mod tests;
