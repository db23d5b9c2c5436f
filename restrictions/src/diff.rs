//! The differences between two policies.

use core::fmt;

use crate::{
    fields::{FieldRule, FieldRules},
    policy::{Policy, TargetSemantics},
    sqe::SqeFlags,
};

/// A difference between two policies, from the view of the first.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Difference {
    /// The second policy allows more.
    Widens(String),
    /// The second policy allows less.
    Narrows(String),
    /// The second policy allows something else.
    Changes(String),
}

impl Difference {
    /// `"widens"`, `"narrows"` or `"changes"`.
    #[must_use]
    pub const fn effect(&self) -> &'static str {
        match self {
            Self::Widens(_) => "widens",
            Self::Narrows(_) => "narrows",
            Self::Changes(_) => "changes",
        }
    }

    /// The description of the difference.
    #[must_use]
    pub fn what(&self) -> &str {
        let (Self::Widens(what) | Self::Narrows(what) | Self::Changes(what)) = self;
        what
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self {
            Self::Widens(_) => '+',
            Self::Narrows(_) => '-',
            Self::Changes(_) => '~',
        };
        write!(f, "{sign} {}", self.what())
    }
}

impl Policy {
    /// All differences of `other` from this policy. Empty if the policies are equal.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<Difference> {
        let mut list = Vec::new();
        for operation in other.operations.difference(&self.operations).iter() {
            list.push(Difference::Widens(format!("SQEs may request {operation}")));
        }
        for operation in self.operations.difference(&other.operations).iter() {
            list.push(Difference::Narrows(format!("SQEs may request {operation}")));
        }
        let each = |flags: SqeFlags| flags.iter().collect::<Vec<SqeFlags>>();
        for flag in each(other.flags_allowed.difference(self.flags_allowed)) {
            list.push(Difference::Widens(format!("SQEs may carry {flag}")));
        }
        for flag in each(self.flags_allowed.difference(other.flags_allowed)) {
            list.push(Difference::Narrows(format!("SQEs may carry {flag}")));
        }
        for flag in each(self.flags_required.difference(other.flags_required)) {
            list.push(Difference::Widens(format!("SQEs need not carry {flag}")));
        }
        for flag in each(other.flags_required.difference(self.flags_required)) {
            list.push(Difference::Narrows(format!("SQEs need not carry {flag}")));
        }
        self.register_differences(other, &mut list);
        field_differences(&self.fields, &other.fields, &mut list);
        if self.target != other.target {
            let kernels = |target| match target {
                TargetSemantics::Auto => "all".to_owned(),
                TargetSemantics::Only(semantics) => semantics.to_string(),
            };
            let what = format!("target kernels: {}, was {}", kernels(other.target), kernels(self.target));
            list.push(Difference::Changes(what));
        }
        for name in other.accepted.difference(self.accepted).names() {
            list.push(Difference::Changes(format!("lint's error {name} is accepted")));
        }
        for name in self.accepted.difference(other.accepted).names() {
            list.push(Difference::Changes(format!("lint's error {name} is no longer accepted")));
        }
        list
    }

    fn register_differences(&self, other: &Self, list: &mut Vec<Difference>) {
        let kept = |policy: &Self| policy.register_operations.union(&policy.register_operations_if_known);
        let (before, after) = (kept(self), kept(other));
        for operation in after.difference(&before).iter() {
            list.push(Difference::Widens(format!("the ring's owner keeps {operation}")));
        }
        for operation in before.difference(&after).iter() {
            list.push(Difference::Narrows(format!("the ring's owner keeps {operation}")));
        }
        for operation in before.intersection(&after).iter() {
            let is_needed = other.register_operations.contains(operation);
            if self.register_operations.contains(operation) != is_needed {
                let needed = if is_needed { "a kernel must have" } else { "a kernel need not have" };
                list.push(Difference::Changes(format!("{needed} {operation}")));
            }
        }
    }
}

fn field_differences(before: &FieldRules, after: &FieldRules, list: &mut Vec<Difference>) {
    let mut rule = |rule: FieldRule, difference: Option<fn(String) -> Difference>, text: String| {
        list.extend(difference.map(|difference| difference(format!("{rule}: {text}"))));
    };
    macro_rules! compare {
        ($field:ident, $rule:ident, $is_within:expr) => {
            rule(
                FieldRule::$rule,
                effect(before.$field, after.$field, $is_within),
                format!("{}, was {}", shown(after.$field), shown(before.$field)),
            )
        };
    }
    compare!(file_slots, FileSlots, |a, b| b.first <= a.first && a.last <= b.last);
    compare!(buffer_slots, BufferSlots, |a, b| b.first <= a.first && a.last <= b.last);
    compare!(offset_window, OffsetWindow, |a, b| b.contains(a.start_bytes, a.len_bytes));
    compare!(length_bytes, LengthBytes, |a, b| b.min <= a.min && a.max <= b.max);
    compare!(alignment_bytes, AlignmentBytes, |a, b| a >= b);
    compare!(rw_flags, RwFlags, |a, b| b.contains(a));
    compare!(ioprio_classes, IoPrioClasses, |a, b| b.contains(a));
    compare!(attributes, Attributes, |a, b| b.contains(a));
    compare!(max_outstanding, MaxOutstanding, |a, b| a <= b);
}

/// `is_within(a, b)`: whether `b` allows everything that `a` allows.
fn effect<R: Copy + PartialEq>(
    before: Option<R>,
    after: Option<R>,
    is_within: fn(R, R) -> bool,
) -> Option<fn(String) -> Difference> {
    match (before, after) {
        _ if before == after => None,
        (Some(_), None) => Some(Difference::Widens),
        (None, _) => Some(Difference::Narrows),
        (Some(before), Some(after)) if is_within(after, before) => Some(Difference::Narrows),
        (Some(before), Some(after)) if is_within(before, after) => Some(Difference::Widens),
        (Some(_), Some(_)) => Some(Difference::Changes),
    }
}

fn shown<R: fmt::Debug>(rule: Option<R>) -> String {
    rule.map_or("no rule".to_owned(), |value| format!("{value:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, BuiltIn, Operation, RegisterOperation, RestrictionSemantics};

    fn lines(from: &Policy, to: &Policy) -> Vec<String> {
        from.differences(to).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_equal_policies_have_no_differences() {
        for one in BuiltIn::ALL {
            for other in BuiltIn::ALL {
                assert_eq!(one.policy().differences(&other.policy()).is_empty(), one == other);
            }
        }
    }

    #[test]
    fn an_added_permission_widens_and_a_removed_one_narrows() {
        let narrow = Policy::direct(Access::ReadOnly);
        let wide = Policy::direct(Access::ReadWrite)
            .with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::IO_LINK)
            .with_flags_required(SqeFlags::empty())
            .allow_register(RegisterOperation::REGISTER_FILES);
        let expected = [
            "SQEs may request IORING_OP_WRITE_FIXED",
            "SQEs may carry IOSQE_IO_LINK",
            "SQEs need not carry IOSQE_FIXED_FILE",
            "the ring's owner keeps IORING_REGISTER_FILES",
        ];
        assert_eq!(lines(&narrow, &wide), expected.map(|what| format!("+ {what}")));
        assert_eq!(lines(&wide, &narrow), expected.map(|what| format!("- {what}")));
    }

    #[test]
    fn a_rule_on_fields_narrows_and_a_moved_window_changes() {
        let window = |start_bytes, len_bytes| {
            Policy::direct(Access::ReadOnly).with_offset_window(crate::OffsetWindow { start_bytes, len_bytes })
        };
        let effect =
            |from: &Policy, to: &Policy| from.differences(to).iter().map(Difference::effect).collect::<Vec<_>>();
        let free = Policy::direct(Access::ReadOnly);
        assert_eq!(effect(&free, &window(0, 4096)), ["narrows"]);
        assert_eq!(effect(&window(0, 4096), &free), ["widens"]);
        assert_eq!(effect(&window(0, 4096), &window(0, 8192)), ["widens"]);
        assert_eq!(effect(&window(0, 8192), &window(4096, 4096)), ["narrows"]);
        assert_eq!(effect(&window(0, 8192), &window(4096, 8192)), ["changes"]);
    }

    #[test]
    fn what_a_policy_accepts_is_a_change() {
        let strict = Policy::direct(Access::ReadOnly);
        let lax = strict.with_accepted(crate::Accepted::UNBOUNDED_WORK);
        assert_eq!(lines(&strict, &lax), ["~ lint's error unbounded-work is accepted"]);
        assert_eq!(lines(&lax, &strict), ["~ lint's error unbounded-work is no longer accepted"]);
    }

    #[test]
    fn an_operation_that_becomes_optional_and_other_target_kernels_are_changes() {
        let needed = Policy::new().allow(Operation::NOP).allow_register(RegisterOperation::REGISTER_EVENTFD);
        let wished = Policy::new()
            .allow(Operation::NOP)
            .allow_register_if_known(RegisterOperation::REGISTER_EVENTFD)
            .with_target(TargetSemantics::Only(RestrictionSemantics::FromLinux7));
        assert_eq!(
            lines(&needed, &wished),
            [
                "~ a kernel need not have IORING_REGISTER_EVENTFD",
                "~ target kernels: from Linux 7.0 (a class without a rule is unrestricted), was all",
            ]
        );
    }
}
