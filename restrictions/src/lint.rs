//! Lint: reports the ways in which a policy would let a guest escape or exhaust the host.

mod kinds;

use core::fmt;

use crate::{
    accept::Accepted,
    fields::FieldRules,
    operation::{Operation, RegisterOperation},
    policy::Policy,
    reach::{Ends, OperationFacts, Reach},
    sqe::SqeFlags,
    support::RestrictionSemantics,
};
pub use kinds::{Lint, Severity};

/// What executes the SQEs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// The host kernel executes the SQEs directly from the ring that the guest writes to.
    Direct,
    /// A program copies and checks each SQE before the kernel executes it.
    Mediated,
}

/// Whether the kernel has CVE-2026-64426 (`NOP` leaks file references).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum NopHole {
    /// The kernel has the hole.
    Open,
    /// The kernel does not have the hole.
    Closed,
    /// Not checked: lint assumes that the kernel has the hole.
    #[default]
    Unknown,
}

/// The context that lint checks a policy for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LintContext {
    /// What executes the SQEs.
    pub mode: Mode,
    /// The semantics of the kernel's restrictions; `None` for all kernels.
    pub semantics: Option<RestrictionSemantics>,
    /// Whether the kernel's `NOP` has the hole.
    pub nop: NopHole,
}

impl LintContext {
    /// The context for any kernel, in the mode that the policy is for: mediated if the policy has rules on fields.
    #[must_use]
    pub const fn for_any_kernel(policy: &Policy) -> Self {
        let mode = if policy.fields.is_empty() { Mode::Direct } else { Mode::Mediated };
        Self { mode, semantics: None, nop: NopHole::Unknown }
    }

    /// For kernels that read restrictions this way; `None` for all kernels.
    #[must_use]
    pub const fn new(mode: Mode, semantics: Option<RestrictionSemantics>) -> Self {
        Self { mode, semantics, nop: NopHole::Unknown }
    }

    /// Sets [`nop`](Self#structfield.nop).
    #[must_use]
    pub const fn nop(self, nop: NopHole) -> Self {
        Self { nop, ..self }
    }
}

/// A finding of lint about a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// The kind of the finding.
    pub lint: Lint,
    /// The severity. An error that the policy accepts is a warning.
    pub severity: Severity,
    /// Whether this would be an error if the policy did not accept it ([`Policy::with_accepted`]).
    pub is_accepted: bool,
    /// The part of the policy that the finding is about, by the kernel's names.
    pub subject: String,
    /// What a guest can do with the subject, or what is wrong with it.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]: {}: {}", self.severity, self.lint, self.subject, self.what)?;
        if self.is_accepted { f.write_str(" (the policy accepts this error)") } else { Ok(()) }
    }
}

impl Policy {
    /// All findings, the most severe first.
    #[must_use]
    pub fn lint(&self, context: &LintContext) -> Vec<Finding> {
        let mut findings = Findings { policy: self, context, list: Vec::new() };
        findings.contradictions();
        findings.classes();
        for operation in self.operations.iter() {
            match operation.facts() {
                None => findings.add(
                    Lint::UnknownOperation,
                    Severity::Error,
                    operation,
                    "the operation is newer than this version, which knows the operations of Linux 7.0",
                ),
                Some(facts) => findings.operation(facts),
            }
        }
        findings.flags();
        findings.reads_and_writes();
        findings.registers();
        findings.acceptances();
        let mut list = findings.list;
        list.sort_by_key(|finding| core::cmp::Reverse(finding.severity));
        list
    }
}

struct Findings<'a> {
    policy: &'a Policy,
    context: &'a LintContext,
    list: Vec<Finding>,
}

impl Findings<'_> {
    fn add(&mut self, lint: Lint, severity: Severity, subject: impl fmt::Display, what: impl fmt::Display) {
        let is_accepted = severity == Severity::Error
            && lint.acceptance().is_some_and(|acceptance| self.policy.accepted.contains(acceptance));
        let severity = if is_accepted { Severity::Warning } else { severity };
        self.list.push(Finding { lint, severity, is_accepted, subject: subject.to_string(), what: what.to_string() });
    }

    fn contradictions(&mut self) {
        let (allowed, required) = (self.policy.flags_allowed, self.policy.flags_required);
        let undefined = (allowed | required).difference(SqeFlags::all());
        if !undefined.is_empty() {
            self.add(Lint::Contradiction, Severity::Error, undefined, "io_uring does not define these flags");
        }
        if !allowed.contains(required) {
            let missing = required.difference(allowed);
            self.add(Lint::Contradiction, Severity::Error, missing, "required, but not allowed");
        }
        if let Some(fault) = self.policy.fields.fault() {
            self.add(Lint::Contradiction, Severity::Error, fault.rule, fault.what);
        }
        if self.context.mode == Mode::Direct {
            for rule in self.policy.fields.rules() {
                self.add(Lint::NotEnforceable, Severity::Error, rule, "no kernel can enforce this rule");
            }
        }
    }

    fn classes(&mut self) {
        if self.policy.operations.is_empty() {
            self.add(Lint::EmptyOperationClass, Severity::Error, "SQE operations", "none is allowed");
        }
        if !self.policy.register_operations.is_empty() {
            return;
        }
        let optional = self.policy.register_operations_if_known();
        let free = "from Linux 7.0 a table without one leaves all register operations unrestricted";
        let (severity, what) = match (self.context.semantics, optional.is_empty()) {
            (Some(RestrictionSemantics::BeforeLinux7), true) => {
                (Severity::Warning, format!("none is allowed; {free}, but this kernel denies them"))
            }
            (_, true) => (Severity::Error, format!("none is allowed; {free}")),
            (_, false) => (Severity::Warning, format!("a kernel without {optional} has none left; {free}")),
        };
        self.add(Lint::EmptyRegisterClass, severity, "register operations", what);
    }

    fn operation(&mut self, facts: &OperationFacts) {
        let operation = facts.operation;
        let required = self.policy.flags_required;
        if facts.takes_file && !required.contains(SqeFlags::FIXED_FILE) {
            let what = "the file may be any descriptor of the process that created the ring";
            self.add(Lint::NoFixedFile, Severity::Error, operation, what);
        }
        if self.context.mode == Mode::Mediated && !self.policy.fields.is_empty() && !FieldRules::judge(operation) {
            self.add(Lint::NeverAllowed, Severity::Warning, operation, "the rules on fields refuse every such SQE");
        }
        for (lint, reach) in special(operation) {
            let severity = match (lint, self.context.nop) {
                (Lint::Nop, NopHole::Closed) => Severity::Warning,
                _ => Severity::Error,
            };
            self.add(lint, severity, operation, format!("lets the guest {}", facts.does));
            if reach.is_all() {
                return;
            }
        }
        self.endings(facts);
        for (lint, reach) in GENERAL {
            let reached = facts.reach & *reach;
            if !reached.is_empty() && special(operation).all(|(_, covered)| !covered.contains(reached)) {
                let severity = self.severity_of(*lint);
                self.add(*lint, severity, operation, format!("lets the guest {}; reaches {reached}", facts.does));
            }
        }
    }

    /// Findings about how many requests of an operation a guest can have under way.
    fn endings(&mut self, facts: &OperationFacts) {
        let (lint, how_many) = match facts.ends {
            Ends::WithDevice => return,
            Ends::AtOnce => (Lint::CompletionFlood, "as fast as it likes"),
            Ends::WithWorker | Ends::WithEvent => (Lint::UnboundedWork, "in any number"),
        };
        let what = format!("lets the guest {}, {how_many}: a request {}", facts.does, facts.ends.description());
        self.add(lint, self.severity_of(lint), facts.operation, what);
    }

    /// The severity of a lint, which is lower if a field rule bounds the effect: in mediated mode a limit on requests
    /// bounds the work that accumulates.
    fn severity_of(&self, lint: Lint) -> Severity {
        let is_mediated = self.context.mode == Mode::Mediated;
        let is_bounded = is_mediated && self.policy.fields.max_outstanding.is_some();
        match lint {
            Lint::UnboundedWork | Lint::CompletionFlood if is_bounded => Severity::Note,
            // The program that executes the requests sees each, and the guest waits for it.
            Lint::CompletionFlood | Lint::OrderedRequests if is_mediated => Severity::Warning,
            Lint::FileSize if self.policy.fields.offset_window.is_some() => Severity::Note,
            _ => Severity::Error,
        }
    }

    fn flags(&mut self) {
        let flags = self.policy.flags_allowed | self.policy.flags_required;
        let ordered = self.severity_of(Lint::OrderedRequests);
        let chained = "lets the guest hang its own ring: a request starts only after the one before it in its chain";
        for (flag, lint, severity, what) in [
            (
                SqeFlags::BUFFER_SELECT,
                Lint::ProvidedBuffers,
                Severity::Error,
                "lets the guest read into addresses that were provided earlier",
            ),
            (
                SqeFlags::ASYNC,
                Lint::AsyncFlag,
                self.severity_of(Lint::UnboundedWork),
                "lets the guest queue any number of requests for worker threads",
            ),
            (
                SqeFlags::IO_DRAIN,
                Lint::OrderedRequests,
                ordered,
                "lets the guest hang its own ring: nothing starts before all earlier requests have ended",
            ),
            (SqeFlags::IO_LINK, Lint::OrderedRequests, ordered, chained),
            (SqeFlags::IO_HARDLINK, Lint::OrderedRequests, ordered, chained),
            (
                SqeFlags::CQE_SKIP_SUCCESS,
                Lint::SkippedCompletions,
                Severity::Warning,
                "lets the guest submit requests that post no CQE",
            ),
        ] {
            if flags.contains(flag) {
                self.add(lint, severity, flag, what);
            }
        }
    }

    /// Findings about reads and writes that no restriction can prevent.
    fn reads_and_writes(&mut self) {
        let transfers = self
            .policy
            .operations
            .iter()
            .any(|operation| [Operation::READ_FIXED, Operation::WRITE_FIXED].contains(&operation));
        let fields = &self.policy.fields;
        if transfers && fields.attributes.is_none() {
            let what = "the kernel reads attr_ptr at any address of the process that created the ring (Linux 6.14)";
            self.add(Lint::Attributes, Severity::Warning, "reads and writes", what);
        }
        let is_realtime = |classes| crate::fields::IoPrioClasses::REALTIME.intersects(classes);
        if transfers && fields.ioprio_classes.is_none_or(is_realtime) {
            let what = "may have realtime priority, if the process that created the ring had the privilege";
            self.add(Lint::RealtimePriority, Severity::Note, "reads and writes", what);
        }
        if self.context.mode == Mode::Direct && self.policy.operations.contains(Operation::WRITE_FIXED) {
            let what = "queues without limit if the file system cannot write without blocking";
            self.add(Lint::BlockingWrites, Severity::Warning, Operation::WRITE_FIXED, what);
        }
        if self.context.mode == Mode::Mediated && fields.max_outstanding.is_none() {
            let what = "is not set: any number of requests may be under way";
            self.add(Lint::NoLimit, Severity::Warning, "fields.max_outstanding", what);
        }
    }

    fn registers(&mut self) {
        let kept = self.policy.register_operations.union(&self.policy.register_operations_if_known);
        for operation in kept.iter().filter(|operation| GRANTING.contains(operation)) {
            let what = "lets the ring's owner change what SQEs reach while the ring runs";
            self.add(Lint::RegisterGrants, Severity::Note, operation, what);
        }
    }

    /// Findings about what the policy accepts without need.
    fn acceptances(&mut self) {
        let needed = self.list.iter().filter_map(|finding| finding.lint.acceptance());
        let needed = needed.fold(Accepted::empty(), Accepted::union);
        for name in self.policy.accepted.difference(needed).names() {
            self.add(Lint::UnusedAcceptance, Severity::Note, name, "accepted, and lint finds nothing of this kind");
        }
    }
}

/// Special lints for some operations, each with the reach that it explains.
fn special(operation: Operation) -> impl Iterator<Item = (Lint, Reach)> {
    let memory = Reach::READS_MEMORY | Reach::WRITES_MEMORY;
    let all = Reach::all();
    let lint = match operation {
        Operation::NOP | Operation::NOP128 => Some((Lint::Nop, Reach::empty())),
        Operation::SPLICE | Operation::TEE => Some((Lint::Splice, Reach::OTHER_FILES)),
        Operation::URING_CMD | Operation::URING_CMD128 => Some((Lint::UringCommand, all)),
        Operation::PROVIDE_BUFFERS | Operation::REMOVE_BUFFERS | Operation::READ_MULTISHOT => {
            Some((Lint::ProvidedBuffers, all))
        }
        Operation::MSG_RING => Some((Lint::MessageRing, Reach::OTHER_RINGS)),
        Operation::READV_FIXED | Operation::WRITEV_FIXED => Some((Lint::VectoredFixed, memory)),
        _ => None,
    };
    lint.into_iter()
}

/// The lint for each part of a reach.
const GENERAL: &[(Lint, Reach)] = &[
    (Lint::RawAddresses, Reach::READS_MEMORY.union(Reach::WRITES_MEMORY)),
    (Lint::OtherFiles, Reach::OTHER_FILES),
    (Lint::Network, Reach::NETWORK),
    (Lint::Processes, Reach::PROCESSES),
    (Lint::FileSize, Reach::FILE_SIZE),
    (Lint::MessageRing, Reach::OTHER_RINGS),
    (Lint::UringCommand, Reach::DRIVER_COMMANDS),
];

/// Register operations that give SQEs access to files, credentials, provided buffers or other rings.
const GRANTING: &[RegisterOperation] = &[
    RegisterOperation::REGISTER_FILES,
    RegisterOperation::REGISTER_FILES_UPDATE,
    RegisterOperation::REGISTER_FILES2,
    RegisterOperation::REGISTER_FILES_UPDATE2,
    RegisterOperation::REGISTER_PERSONALITY,
    RegisterOperation::REGISTER_PBUF_RING,
    RegisterOperation::REGISTER_ZCRX_IFQ,
];

#[cfg(test)]
mod tests;
