use proptest::prelude::*;

use super::*;
use crate::policy::Access;

/// A kernel that knows the operations up to and including these.
fn kernel(last: Operation, last_register: RegisterOperation, semantics: RestrictionSemantics) -> KernelSupport {
    KernelSupport {
        operations: (0..=last.code()).map(Operation::new).collect(),
        register_operations: (0..=last_register.code()).map(RegisterOperation::new).collect(),
        numbered: (0..=last.code()).map(Operation::new).collect(),
        buffer_select: OperationSet::new(),
        semantics,
    }
}

fn linux_6_18() -> KernelSupport {
    kernel(Operation::PIPE, RegisterOperation::REGISTER_QUERY, RestrictionSemantics::BeforeLinux7)
}

fn linux_6_6() -> KernelSupport {
    kernel(Operation::SENDMSG_ZC, RegisterOperation::REGISTER_FILE_ALLOC_RANGE, RestrictionSemantics::BeforeLinux7)
}

#[test]
fn the_direct_policy_compiles_to_its_table() {
    let compiled = Policy::direct(Access::ReadWrite).compile(&linux_6_18()).unwrap();
    let table: Vec<(u16, u8)> = compiled.entries().iter().map(|entry| (entry.opcode(), entry.value())).collect();
    assert_eq!(table, [(1, 4), (1, 5), (2, 1), (3, 1), (0, 4), (0, 5), (0, 16), (0, 30)]);
}

#[test]
fn an_optional_register_operation_is_left_out_where_the_kernel_lacks_it() {
    let old = Policy::direct(Access::ReadOnly).compile(&linux_6_6()).unwrap();
    assert!(!old.register_operations().contains(RegisterOperation::REGISTER_CLONE_BUFFERS));
    assert!(old.register_operations().contains(RegisterOperation::REGISTER_BUFFERS_UPDATE));
    let new = Policy::direct(Access::ReadOnly).compile(&linux_6_18()).unwrap();
    assert!(new.register_operations().contains(RegisterOperation::REGISTER_CLONE_BUFFERS));
}

#[test]
fn the_error_names_all_unknown_operations_and_a_kernel_that_has_them() {
    let policy = Policy::direct(Access::ReadWrite)
        .allow(Operation::READV_FIXED)
        .allow(Operation::FTRUNCATE)
        .allow_register(RegisterOperation::REGISTER_RESIZE_RINGS);
    assert_eq!(
        policy.compile(&linux_6_6()).unwrap_err().to_string(),
        "this kernel does not know IORING_OP_FTRUNCATE, IORING_OP_READV_FIXED, IORING_REGISTER_RESIZE_RINGS: \
         use Linux 6.15 or later, or a policy without them"
    );
}

#[test]
fn an_operation_without_a_name_is_shown_by_number() {
    let policy = Policy::direct(Access::ReadWrite).allow(Operation::new(200));
    assert_eq!(
        policy.compile(&linux_6_18()).unwrap_err().to_string(),
        "this kernel does not know IORING_OP 200: remove them from the policy"
    );
}

#[test]
fn a_policy_without_an_sqe_operation_is_refused() {
    let policy = Policy::new().allow_register(RegisterOperation::REGISTER_EVENTFD);
    let error = policy.compile(&linux_6_18()).unwrap_err();
    assert_eq!(error, CompileError::EmptyClass { class: Class::Operations });
    assert_eq!(
        error.to_string(),
        "the policy allows no SQE operation on this kernel, and from Linux 7.0 a table without any leaves them all \
         unrestricted: allow at least one"
    );
}

#[test]
fn a_policy_whose_only_register_operation_the_kernel_lacks_is_refused() {
    let policy =
        Policy::new().allow(Operation::READ_FIXED).allow_register_if_known(RegisterOperation::REGISTER_CLONE_BUFFERS);
    assert!(policy.compile(&linux_6_18()).is_ok());
    assert_eq!(policy.compile(&linux_6_6()), Err(CompileError::EmptyClass { class: Class::RegisterOperations }),);
}

#[test]
fn a_required_flag_must_be_allowed() {
    let policy = Policy::direct(Access::ReadOnly).with_flags_required(SqeFlags::FIXED_FILE | SqeFlags::IO_DRAIN);
    assert_eq!(
        policy.compile(&linux_6_18()).unwrap_err().to_string(),
        "the policy requires IOSQE_IO_DRAIN but allows only IOSQE_FIXED_FILE: allow the required flags"
    );
}

#[test]
fn a_flag_that_io_uring_does_not_define_is_refused() {
    let policy = Policy::direct(Access::ReadOnly).with_flags_allowed(SqeFlags::from_bits_retain(0x81));
    assert_eq!(
        policy.compile(&linux_6_18()).unwrap_err().to_string(),
        "the policy names flag bits that io_uring does not define: undefined 0x80"
    );
}

#[test]
fn a_policy_for_other_kernels_is_refused() {
    let policy =
        Policy::direct(Access::ReadOnly).with_target(TargetSemantics::Only(RestrictionSemantics::BeforeLinux7));
    assert!(policy.compile(&linux_6_18()).is_ok());
    let linux_7_0 =
        kernel(Operation::URING_CMD128, RegisterOperation::REGISTER_BPF_FILTER, RestrictionSemantics::FromLinux7);
    assert_eq!(
        policy.compile(&linux_7_0).unwrap_err().to_string(),
        "the policy is for kernels before Linux 7.0 (what is not listed is denied), but this kernel has the semantics \
         from Linux 7.0 (a class without a rule is unrestricted)"
    );
}

fn semantics() -> impl Strategy<Value = RestrictionSemantics> {
    prop_oneof![Just(RestrictionSemantics::BeforeLinux7), Just(RestrictionSemantics::FromLinux7)]
}

fn kernels() -> impl Strategy<Value = KernelSupport> {
    (30..80u8, 20..50u8, semantics()).prop_map(|(last, register, semantics)| {
        kernel(Operation::new(last), RegisterOperation::new(register), semantics)
    })
}

/// Arbitrary policies: empty classes, unknown operations and contradicting flags are as likely as sound policies.
fn policies() -> impl Strategy<Value = Policy> {
    let flags = || prop_oneof![4 => 0..4u8, 1 => any::<u8>()].prop_map(SqeFlags::from_bits_retain);
    let target = prop_oneof![3 => Just(TargetSemantics::Auto), 1 => semantics().prop_map(TargetSemantics::Only)];
    let codes = |last: u8| prop::collection::vec(0..last, 0..6);
    (codes(70), codes(45), codes(45), flags(), flags(), target).prop_map(
        |(operations, register, optional, allowed, required, target)| {
            let policy = Policy::new().with_flags_allowed(allowed).with_flags_required(required).with_target(target);
            let policy = operations.into_iter().fold(policy, |policy, code| policy.allow(Operation::new(code)));
            let policy =
                register.into_iter().fold(policy, |policy, code| policy.allow_register(RegisterOperation::new(code)));
            optional
                .into_iter()
                .fold(policy, |policy, code| policy.allow_register_if_known(RegisterOperation::new(code)))
        },
    )
}

/// Parses a table as the kernel does (`io_parse_restrictions`): later flag entries overwrite earlier ones.
#[derive(Default)]
struct Parsed {
    operations: Vec<Operation>,
    register_operations: Vec<RegisterOperation>,
    allowed: Vec<SqeFlags>,
    required: Vec<SqeFlags>,
}

fn parse(entries: &[Restriction]) -> Parsed {
    let mut parsed = Parsed::default();
    for entry in entries {
        match entry.kind() {
            RestrictionKind::Operation(operation) => parsed.operations.push(operation),
            RestrictionKind::RegisterOperation(operation) => parsed.register_operations.push(operation),
            RestrictionKind::FlagsAllowed(flags) => parsed.allowed.push(flags),
            RestrictionKind::FlagsRequired(flags) => parsed.required.push(flags),
        }
    }
    parsed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_compiled_table_matches_the_policy_and_is_valid_for_the_kernel(policy in policies(), kernel in kernels()) {
        let Ok(compiled) = policy.compile(&kernel) else { return Ok(()) };
        let parsed = parse(compiled.entries());
        // The kernel's own limit on the table's length.
        prop_assert!(compiled.entries().len() <= 4 + kernel.operations.len() + kernel.register_operations.len());
        prop_assert!(!parsed.operations.is_empty() && !parsed.register_operations.is_empty());
        prop_assert!(parsed.operations.is_sorted_by(|a, b| a < b), "sorted, so none twice");
        prop_assert!(parsed.register_operations.is_sorted_by(|a, b| a < b), "sorted, so none twice");
        prop_assert_eq!(parsed.allowed, [policy.flags_allowed()]);
        prop_assert_eq!(parsed.required, [policy.flags_required()]);
        prop_assert!(policy.flags_allowed().contains(policy.flags_required()));
        prop_assert_eq!(parsed.operations.into_iter().collect::<OperationSet>(), policy.operations());
        prop_assert_eq!(policy.operations().difference(&kernel.operations), OperationSet::new());
        let listed: RegisterOperationSet = parsed.register_operations.into_iter().collect();
        prop_assert_eq!(listed, compiled.register_operations());
        let wished = policy.register_operations().union(&policy.register_operations_if_known());
        prop_assert_eq!(listed, wished.intersection(&kernel.register_operations));
        prop_assert_eq!(policy.register_operations().difference(&listed), RegisterOperationSet::new());
    }

    #[test]
    fn a_compile_error_names_a_fault_that_the_policy_has(policy in policies(), kernel in kernels()) {
        let Err(error) = policy.compile(&kernel) else { return Ok(()) };
        match error {
            CompileError::UnknownOperations { operations, register_operations } => {
                prop_assert!(!operations.is_empty() || !register_operations.is_empty());
                prop_assert_eq!(operations, policy.operations().difference(&kernel.operations));
                prop_assert_eq!(
                    register_operations,
                    policy.register_operations().difference(&kernel.register_operations)
                );
            }
            CompileError::EmptyClass { class: Class::Operations } => prop_assert!(policy.operations().is_empty()),
            CompileError::EmptyClass { class: Class::RegisterOperations } => {
                let wished = policy.register_operations().union(&policy.register_operations_if_known());
                prop_assert!(wished.intersection(&kernel.register_operations).is_empty());
            }
            CompileError::RequiredFlagNotAllowed { required, allowed } => {
                prop_assert!(!allowed.contains(required));
            }
            CompileError::UndefinedFlags { flags } => prop_assert_eq!(flags.bits(), 0x80),
            CompileError::NeedsMediation { fields } => prop_assert!(!fields.is_empty()),
            CompileError::OtherSemantics { policy: for_kernels, kernel: semantics } => {
                prop_assert_ne!(for_kernels, semantics);
                prop_assert_eq!(semantics, kernel.semantics);
            }
        }
    }

    #[test]
    fn the_same_policy_written_in_another_order_compiles_to_the_same_table(
        codes in prop::collection::btree_set(0..30u8, 1..8).prop_map(|set| set.into_iter().collect::<Vec<u8>>())
            .prop_flat_map(|codes| (Just(codes.clone()), Just(codes).prop_shuffle()))
    ) {
        let policy = |codes: &[u8]| codes.iter().fold(
            Policy::direct(Access::ReadOnly),
            |policy, &code| policy.allow(Operation::new(code)).allow_register(RegisterOperation::new(code)),
        );
        prop_assert_eq!(policy(&codes.0).compile(&linux_6_18()), policy(&codes.1).compile(&linux_6_18()));
    }
}
