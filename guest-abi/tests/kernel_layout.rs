//! Every field, size and constant that the crate mirrors, compared with the kernel's `<linux/io_uring.h>` through the C
//! compiler.
//!
//! Needs a C compiler (`cc`, or what `CC` names) and the kernel's headers: on Debian the packages gcc, libc6-dev and
//! linux-libc-dev (6.1 or later).

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestCaseError, TestRunner};
use ringpass_guest_abi::{CQ_EVENTFD_DISABLED, Cqe, Opcode, SQ_CQ_OVERFLOW, SQ_NEED_WAKEUP, Sqe, SqeFlags};

/// Compiles `kernel_layout.c` into a separate file for each test, because tests run at the same time.
fn compile(test: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernel_layout.c");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernel_layout_{test}"));
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let output = Command::new(&compiler)
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o"])
        .args([&program, &source])
        .output()
        .unwrap_or_else(|error| {
            panic!("cannot run the C compiler {compiler:?} ({error}): install the Debian packages gcc and libc6-dev")
        });
    assert!(
        output.status.success(),
        "{compiler:?} cannot compile {}; if it misses a header, install the Debian packages libc6-dev and \
         linux-libc-dev (6.1 or later):\n{}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    program
}

fn run(program: &Path, args: &[String]) -> String {
    let output = Command::new(program).args(args).output().expect("the program was just compiled");
    assert!(output.status.success(), "{} {args:?} ended with {}", program.display(), output.status);
    String::from_utf8(output.stdout).expect("the program prints ASCII")
}

/// Name and offset and size of each field.
type Fields = Vec<(&'static str, usize, usize)>;

/// The fields of a struct; a field that is missing here does not compile.
macro_rules! fields {
    ($type:ident { $($field:ident),* $(,)? }) => {{
        let value = $type::default();
        let $type { $($field),* } = value;
        let fields: Fields = vec![$((stringify!($field), offset_of!($type, $field), size_of_val(&$field))),*];
        fields
    }};
}

fn sqe_fields() -> Fields {
    fields!(Sqe {
        opcode,
        flags,
        ioprio,
        fd,
        off_bytes,
        addr,
        len_bytes,
        rw_flags,
        user_data,
        buf_index,
        personality,
        file_index,
        addr3,
        pad2,
    })
}

fn cqe_fields() -> Fields {
    fields!(Cqe { user_data, res, flags })
}

/// The layout of the crate, in the format of the C program's output.
fn our_facts() -> BTreeMap<String, Vec<i64>> {
    let mut facts = BTreeMap::new();
    let mut add = |name: String, numbers: &[i64]| assert!(facts.insert(name, numbers.to_vec()).is_none());
    for (entry, fields) in [("sqe", sqe_fields()), ("cqe", cqe_fields())] {
        for (field, offset_bytes, size_bytes) in fields {
            add(format!("{entry}.{field}"), &[offset_bytes as i64, size_bytes as i64]);
        }
    }
    add("sqe".into(), &[size_of::<Sqe>() as i64, align_of::<Sqe>() as i64]);
    add("cqe".into(), &[size_of::<Cqe>() as i64, align_of::<Cqe>() as i64]);
    let constants = [
        ("IORING_OP_READ_FIXED", Opcode::ReadFixed as i64),
        ("IORING_OP_WRITE_FIXED", Opcode::WriteFixed as i64),
        ("IOSQE_FIXED_FILE", SqeFlags::FIXED_FILE.0.into()),
        ("IORING_SQ_NEED_WAKEUP", SQ_NEED_WAKEUP.into()),
        ("IORING_SQ_CQ_OVERFLOW", SQ_CQ_OVERFLOW.into()),
        ("IORING_CQ_EVENTFD_DISABLED", CQ_EVENTFD_DISABLED.into()),
        ("RWF_DSYNC", Sqe::default().durable().rw_flags.into()),
    ];
    constants.into_iter().for_each(|(name, value)| add(name.into(), &[value]));
    facts
}

fn kernel_facts(program: &Path) -> BTreeMap<String, Vec<i64>> {
    let text = run(program, &["facts".into()]);
    let fact = |line: &str| {
        let mut words = line.split(' ');
        let name = words.next().expect("split gives at least one word").to_owned();
        (name, words.map(|word| word.parse().expect("a number")).collect())
    };
    text.lines().map(fact).collect()
}

#[test]
fn every_field_size_and_constant_matches_the_kernel() {
    assert_eq!(our_facts(), kernel_facts(&compile("facts")));
}

#[test]
fn the_fields_fill_their_entry_without_a_gap() {
    for (fields, entry_bytes) in [(sqe_fields(), 64), (cqe_fields(), 16)] {
        let end = fields.iter().fold(0, |end, (field, offset_bytes, size_bytes)| {
            assert_eq!(*offset_bytes, end, "{field} does not follow the field before it");
            end + size_bytes
        });
        assert_eq!(end, entry_bytes);
    }
}

/// Runs `test` on random values, and prints the seed. With that seed in the environment a run chooses the same values.
fn for_random<S: Strategy>(strategy: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let mut config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(RandomState::new().build_hasher().finish());
    }
    if let RngSeed::Fixed(seed) = config.rng_seed {
        eprintln!("PROPTEST_RNG_SEED={seed}");
    }
    TestRunner::new(config).run(&strategy, test).unwrap_or_else(|failure| panic!("{failure}"));
}

fn hex(words: &[u64]) -> String {
    words.iter().flat_map(|word| word.to_ne_bytes()).map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn an_sqe_in_words_has_the_bytes_of_the_kernels_struct() {
    let program = compile("sqe");
    for_random(any::<[u64; 14]>(), |values| {
        let [opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data, buf, personality, file, addr3, pad2] =
            values;
        let sqe = Sqe {
            opcode: opcode as u8,
            flags: flags as u8,
            ioprio: ioprio as u16,
            fd: fd as i32,
            off_bytes: off,
            addr,
            len_bytes: len as u32,
            rw_flags: rw_flags as u32,
            user_data,
            buf_index: buf as u16,
            personality: personality as u16,
            file_index: file as u32,
            addr3,
            pad2,
        };
        let args: Vec<String> = ["sqe".to_owned()].into_iter().chain(values.map(|value| value.to_string())).collect();
        prop_assert_eq!(hex(&sqe.to_words()) + "\n", run(&program, &args));
        Ok(())
    });
}

#[test]
fn a_cqe_is_read_from_the_bytes_of_the_kernels_struct() {
    let program = compile("cqe");
    for_random(any::<[u64; 3]>(), |values| {
        let args: Vec<String> = ["cqe".to_owned()].into_iter().chain(values.map(|value| value.to_string())).collect();
        let text = run(&program, &args);
        let byte = |at: usize| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).expect("the program prints hex");
        let words = [0, 8].map(|start| u64::from_ne_bytes(std::array::from_fn(|at| byte(start + at))));
        let [user_data, res, flags] = values;
        prop_assert_eq!(Cqe::from_words(words), Cqe { user_data, res: res as i32, flags: flags as u32 });
        Ok(())
    });
}
