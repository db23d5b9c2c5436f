//! Describes in words what a guest can do under a policy.

use core::fmt::{self, Write as _};

use crate::{
    fields::{FieldRules, IoPrioClasses},
    operation::Operation,
    policy::{Policy, TargetSemantics},
    reach::{Ends, Reach},
    sqe::SqeFlags,
};

impl Policy {
    /// Describes in words what a guest can do under this policy, over several lines.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_description(&mut text);
        text
    }

    fn write_description(&self, out: &mut String) -> fmt::Result {
        if self.operations.is_empty() {
            writeln!(out, "A guest can do nothing.")?;
        } else {
            writeln!(out, "A guest can")?;
            for operation in self.operations.iter() {
                let does = operation.facts().map_or("do something unknown to this version", |facts| facts.does);
                writeln!(out, "  - {does} ({operation})")?;
            }
            writeln!(out, "on {}.", self.files())?;
            writeln!(out, "In addition, the guest reaches {}.", self.reach())?;
            self.write_endings(out)?;
        }
        self.write_flags(out)?;
        self.write_orders(out)?;
        write_fields(out, &self.fields)?;
        writeln!(out, "While the ring runs, its owner keeps: {}.", self.register_operations)?;
        let optional = self.register_operations_if_known();
        if !optional.is_empty() {
            writeln!(out, "On kernels that support them, the owner also keeps: {optional}.")?;
        }
        if let TargetSemantics::Only(semantics) = self.target {
            writeln!(out, "The policy is for kernels {semantics} only.")?;
        }
        if !self.accepted.is_empty() {
            writeln!(out, "The policy accepts these errors of lint: {}.", self.accepted)?;
        }
        let mode = if self.fields.is_empty() {
            "The kernel can enforce the policy (direct mode), and so can a program that checks each SQE (mediated mode)."
        } else {
            "The kernel cannot enforce the policy: only a program that checks each SQE can (mediated mode)."
        };
        writeln!(out, "{mode}")
    }

    fn files(&self) -> &'static str {
        let takes_file = |operation: Operation| operation.facts().is_none_or(|facts| facts.takes_file);
        if !self.operations.iter().any(takes_file) {
            "no file"
        } else if self.flags_required.contains(SqeFlags::FIXED_FILE) {
            "the files in the ring's table"
        } else {
            "any open file of the process that created the ring"
        }
    }

    fn reach(&self) -> String {
        if self.operations.iter().any(|operation| operation.facts().is_none()) {
            return "things unknown to this version".to_owned();
        }
        let facts = self.operations.iter().filter_map(Operation::facts);
        facts.fold(Reach::empty(), |reach, facts| reach | facts.reach).to_string()
    }

    /// The operations of which a guest can have more requests than the device bounds.
    fn write_endings(&self, out: &mut String) -> fmt::Result {
        let facts = || self.operations.iter().filter_map(Operation::facts);
        for (ends, beginning) in [
            (Ends::WithEvent, "Any number of requests can be under way, and each may wait for ever"),
            (Ends::WithWorker, "Any number of requests can wait for worker threads of the kernel"),
            (Ends::AtOnce, "Requests that end at once fill the kernel's memory with completions"),
        ] {
            let mut operations = facts().filter(|facts| facts.ends == ends).map(|facts| facts.operation);
            if let Some(first) = operations.next() {
                write!(out, "{beginning}: {first}")?;
                operations.try_for_each(|operation| write!(out, ", {operation}"))?;
                writeln!(out, ".")?;
            }
        }
        Ok(())
    }

    fn write_flags(&self, out: &mut String) -> fmt::Result {
        if self.flags_allowed == self.flags_required {
            return writeln!(out, "The flags of an SQE must be exactly: {}.", self.flags_required);
        }
        writeln!(out, "The flags of an SQE must include: {}; may include: {}.", self.flags_required, self.flags_allowed)
    }

    fn write_orders(&self, out: &mut String) -> fmt::Result {
        let ordered = SqeFlags::IO_DRAIN | SqeFlags::IO_LINK | SqeFlags::IO_HARDLINK;
        let flags = (self.flags_allowed | self.flags_required) & ordered;
        if flags.is_empty() {
            return Ok(());
        }
        writeln!(out, "The guest can make requests wait for each other, and hang its own ring: {flags}.")
    }
}

fn write_fields(out: &mut String, fields: &FieldRules) -> fmt::Result {
    if fields.is_empty() {
        return Ok(());
    }
    writeln!(out, "In each SQE")?;
    let FieldRules {
        file_slots,
        buffer_slots,
        offset_window,
        length_bytes,
        alignment_bytes,
        rw_flags,
        ioprio_classes,
        attributes,
        max_outstanding,
    } = fields;
    if let Some(slots) = file_slots {
        writeln!(out, "  - the file must be slot {} to {} of the table", slots.first, slots.last)?;
    }
    if let Some(slots) = buffer_slots {
        writeln!(out, "  - the buffer must be slot {} to {} of the table", slots.first, slots.last)?;
    }
    if let Some(window) = offset_window {
        writeln!(out, "  - the data must lie in the {} bytes from byte {}", window.len_bytes, window.start_bytes)?;
    }
    if let Some(length) = length_bytes {
        writeln!(out, "  - the length must be {} to {} bytes", length.min, length.max)?;
    }
    if let Some(alignment) = alignment_bytes {
        writeln!(out, "  - offset and length must be multiples of {alignment} bytes")?;
    }
    if let Some(flags) = rw_flags {
        writeln!(out, "  - rw_flags may have: {}", names(flags.iter_names(), "RWF_"))?;
    }
    if let Some(classes) = ioprio_classes {
        writeln!(out, "  - the priority class may be: {}", names(classes.iter_names(), "IOPRIO_CLASS_"))?;
        if !classes.contains(IoPrioClasses::NONE) {
            writeln!(out, "    (a priority must be given)")?;
        }
    }
    if let Some(attributes) = attributes {
        writeln!(out, "  - attributes may be: {}", names(attributes.iter_names(), "IORING_RW_ATTR_FLAG_"))?;
    }
    if let Some(max) = max_outstanding {
        writeln!(out, "  - at most {max} requests may be under way at once")?;
    }
    Ok(())
}

fn names<T>(flags: impl Iterator<Item = (&'static str, T)>, prefix: &str) -> String {
    let mut text = String::new();
    for (name, _) in flags {
        let separator = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{separator}{prefix}{name}");
    }
    if text.is_empty() { "none".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Access;

    #[test]
    fn the_direct_policy_is_described_completely() {
        assert_eq!(
            Policy::direct(Access::ReadOnly).describe(),
            "A guest can\n  - read files into registered buffers (IORING_OP_READ_FIXED)\n\
             on the files in the ring's table.\n\
             In addition, the guest reaches nothing else.\n\
             The flags of an SQE must be exactly: IOSQE_FIXED_FILE.\n\
             While the ring runs, its owner keeps: IORING_REGISTER_EVENTFD, IORING_UNREGISTER_EVENTFD, \
             IORING_REGISTER_BUFFERS_UPDATE.\n\
             On kernels that support them, the owner also keeps: IORING_REGISTER_CLONE_BUFFERS.\n\
             The kernel can enforce the policy (direct mode), and so can a program that checks each SQE (mediated \
             mode).\n"
        );
    }

    #[test]
    fn the_mediated_policy_names_every_rule() {
        let text = Policy::mediated(Access::ReadWrite).describe();
        for rule in [
            "the file must be slot 0 to 0 of the table",
            "the length must be 512 to 1073741824 bytes",
            "offset and length must be multiples of 512 bytes",
            "rw_flags may have: RWF_DSYNC, RWF_NOWAIT, RWF_DONTCACHE",
            "the priority class may be: IOPRIO_CLASS_NONE, IOPRIO_CLASS_BEST_EFFORT, IOPRIO_CLASS_IDLE",
            "attributes may be: none",
            "at most 65536 requests may be under way at once",
            "The kernel cannot enforce the policy",
        ] {
            assert!(text.contains(rule), "{rule}: {text}");
        }
    }

    #[test]
    fn what_exhausts_the_host_or_hangs_the_ring_is_described() {
        let text = Policy::direct(Access::ReadOnly)
            .allow(Operation::FSYNC)
            .allow(Operation::FALLOCATE)
            .allow(Operation::POLL_ADD)
            .allow(Operation::NOP)
            .with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::IO_DRAIN)
            .with_accepted(crate::Accepted::UNBOUNDED_WORK)
            .describe();
        for line in [
            "Any number of requests can be under way, and each may wait for ever: IORING_OP_POLL_ADD.\n",
            "Any number of requests can wait for worker threads of the kernel: IORING_OP_FSYNC, IORING_OP_FALLOCATE.\n",
            "Requests that end at once fill the kernel's memory with completions: IORING_OP_NOP.\n",
            "The guest can make requests wait for each other, and hang its own ring: IOSQE_IO_DRAIN.\n",
            "The policy accepts these errors of lint: unbounded-work.\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn a_way_to_escape_is_described() {
        let text =
            Policy::direct(Access::ReadOnly).allow(Operation::OPENAT).with_flags_required(SqeFlags::empty()).describe();
        assert!(text.contains("open any file that the owner may open (IORING_OP_OPENAT)"), "{text}");
        assert!(text.contains("on any open file of the process that created the ring."), "{text}");
        assert!(text.contains("the guest reaches any address of the ring's owner, to read, files outside"), "{text}");
        assert!(Policy::new().describe().starts_with("A guest can do nothing.\n"));
        let unknown = Policy::new().allow(Operation::new(99)).describe();
        assert!(unknown.contains("do something unknown to this version (IORING_OP 99)"), "{unknown}");
    }
}
