//! The comparison of kernel and checker as the body of a fuzz target: a table and SQEs made of bytes.

use std::sync::OnceLock;

use ringpass_restrictions::{KernelSupport, Operation, RegisterOperation, RestrictionKind, Sqe, SqeFlags};

use crate::{
    differential::{Case, Tally, check},
    kernel,
};

/// The most SQEs of one input.
const SQES_MAX: usize = 256;

/// Makes a table and SQEs from the bytes, submits the SQEs to a ring with that table, and compares each result with the
/// checker's verdict.
///
/// # Panics
///
/// If kernel and checker do not agree, or if the kernel refuses to make the ring.
pub fn policy_kernel(bytes: &[u8]) {
    run(bytes);
}

/// Runs the case of the bytes, and returns the counts.
fn run(bytes: &[u8]) -> Tally {
    static KERNEL: OnceLock<KernelSupport> = OnceLock::new();
    let kernel = KERNEL.get_or_init(|| kernel::support().expect("a kernel with io_uring"));
    let mut tally = Tally::default();
    if let Err(error) = check(&case(bytes, kernel), kernel, &mut tally) {
        panic!("{error:#}");
    }
    tally
}

fn case(bytes: &[u8], kernel: &KernelSupport) -> Case {
    let mut bytes = bytes.iter().copied();
    let mut next = || bytes.next();
    let operations: Vec<Operation> = kernel.numbered.iter().collect();
    let register: Vec<RegisterOperation> = kernel.register_operations.iter().collect();
    let mut table = Vec::new();
    let entries = next().unwrap_or(0) % 12;
    for _ in 0..=entries {
        let (kind, value) = (next().unwrap_or(0), next().unwrap_or(0));
        table.push(match kind % 8 {
            0 => RestrictionKind::FlagsAllowed(SqeFlags::from_bits_retain(value)),
            1 => RestrictionKind::FlagsRequired(SqeFlags::from_bits_retain(value)),
            2 => RestrictionKind::RegisterOperation(register[usize::from(value) % register.len()]),
            _ => RestrictionKind::Operation(operations[usize::from(value) % operations.len()]),
        });
    }
    let named: Vec<Operation> = table
        .iter()
        .filter_map(|entry| match entry {
            RestrictionKind::Operation(operation) => Some(*operation),
            _ => None,
        })
        .collect();
    let required = table.iter().fold(SqeFlags::empty(), |all, entry| match entry {
        RestrictionKind::FlagsRequired(flags) => *flags,
        _ => all,
    });
    let mut sqes = Vec::new();
    while let (Some(choice), Some(opcode), Some(flags)) = (next(), next(), next()) {
        // An SQE that passes is similar to the table.
        let opcode = match choice % 4 {
            0 => opcode,
            1 => opcode % 80,
            _ => named.get(usize::from(opcode) % named.len().max(1)).map_or(opcode, |operation| operation.code()),
        };
        let flags = match choice / 4 % 4 {
            0 => flags,
            1 => 0,
            2 => required.bits() | 1 << (flags % 8),
            _ => required.bits(),
        };
        // The SQE is zeroes except for a few bytes: the kernel refuses many fields unless they are zero.
        let mut words = [0u64; 8];
        for _ in 0..next().unwrap_or(0) % 8 {
            let (place, value) = (next().unwrap_or(0) % 64, next().unwrap_or(0));
            words[usize::from(place / 8)] |= u64::from(value) << (8 * (place % 8));
        }
        sqes.push(Sqe { opcode, flags, ..Sqe::from_words(words) });
        if sqes.len() == SQES_MAX {
            break;
        }
    }
    Case { table, sqes }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Enough bytes for a table and some dozens of SQEs.
    const BYTES_MAX: usize = 400;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn the_kernel_agrees_with_the_checker(bytes in vec(any::<u8>(), 0..BYTES_MAX)) {
            policy_kernel(&bytes);
        }
    }

    #[test]
    fn arbitrary_tables_and_sqes_reach_every_outcome() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut all = Tally::default();
        for number in 0..300 {
            let mut bytes = vec![0; rng.usize(1..BYTES_MAX)];
            rng.fill(&mut bytes);
            let tally = run(&bytes);
            all.allowed += tally.allowed;
            all.refused_by_table += tally.refused_by_table;
            all.refused_before += tally.refused_before;
            if number < 50 {
                save_seed(&format!("arbitrary-{number}"), &bytes);
            }
        }
        assert!(all.allowed > 20 && all.refused_by_table > 100 && all.refused_before > 100, "{all:?}");
    }

    /// Saves an input from which a fuzzer begins, in the directory that `cargo xtask` names in `RINGPASS_FUZZ_SEEDS`.
    /// Without that variable it does nothing.
    fn save_seed(name: &str, bytes: &[u8]) {
        let Some(directory) = std::env::var_os("RINGPASS_FUZZ_SEEDS") else { return };
        let directory = std::path::Path::new(&directory).join("policy_kernel");
        std::fs::create_dir_all(&directory).expect("a directory for the seeds");
        std::fs::write(directory.join(name), bytes).expect("a file for the seed");
    }
}
