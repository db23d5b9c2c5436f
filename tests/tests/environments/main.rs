//! The programs in environments that lack something: file systems, limits, system calls, privileges. Each program works
//! there, or ends at once with a line that says what is missing and what to change. `ringpass probe` agrees with
//! `ringpass serve`.

mod place;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    harness::{self, Test, test},
    needs::Need,
};

use place::{Ended, Mode, Place, assert_line};

/// What a program must do.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// It does its work.
    Works,
    /// It ends with one line that has these parts.
    Says(&'static [&'static str]),
    /// One or the other: that depends on the kernel or on the number of CPUs.
    WorksOrSays(&'static [&'static str]),
}

use Expected::{Says, Works, WorksOrSays};

/// An environment, and what each program must do there.
struct Case {
    name: &'static str,
    words: &'static [&'static str],
    virtqueue: Expected,
    direct: Expected,
    demo: Expected,
    dd: Expected,
}

const ALLOW: &[&str] = &["a seccomp filter", "--security-opt seccomp=PROFILE.json"];
const NO_PROC: &[&str] = &["/proc is not mounted", "mount -t proc proc /proc"];
const NO_FILES: &[&str] = &["RLIMIT_NOFILE", "ulimit -H -n", "LimitNOFILE="];
const NO_MEMORY: &[&str] = &["RLIMIT_MEMLOCK is 0 bytes", "ulimit -H -l", "LimitMEMLOCK="];

const fn everywhere(name: &'static str, words: &'static [&'static str], expected: Expected) -> Case {
    Case { name, words, virtqueue: expected, direct: expected, demo: expected, dd: Works }
}

const CASES: [Case; 15] = [
    everywhere("an_ordinary_environment", &[], Works),
    everywhere("a_user_namespace", &["user-namespace"], Works),
    everywhere("no_proc", &["without=/proc"], Says(NO_PROC)),
    everywhere("no_sys", &["without=/sys"], Works),
    Case {
        virtqueue: Works,
        direct: Says(&["no place for a temporary directory", "mount a tmpfs at /dev/shm", "TMPDIR="]),
        demo: Says(&["no place for a temporary directory", "TMPDIR="]),
        ..everywhere("read_only_file_systems", &["read-only-but=DIRECTORY"], Works)
    },
    Case {
        direct: Says(&["RLIMIT_MEMLOCK is 0 bytes", "LimitMEMLOCK="]),
        ..everywhere("no_lockable_memory", &["memlock=0", "nobody"], WorksOrSays(NO_MEMORY))
    },
    Case { dd: Says(&["RLIMIT_NOFILE", "ulimit -n"]), ..everywhere("10_files", &["nofile=10"], Says(NO_FILES)) },
    Case { dd: WorksOrSays(&["RLIMIT_NOFILE"]), ..everywhere("20_files", &["nofile=20"], Says(NO_FILES)) },
    Case { demo: WorksOrSays(NO_FILES), ..everywhere("64_files", &["nofile=64"], WorksOrSays(NO_FILES)) },
    everywhere("io_uring_setup_refused", &["filter=io_uring_setup:EPERM"], Says(ALLOW)),
    everywhere("io_uring_setup_hidden", &["filter=io_uring_setup:ENOSYS"], Says(ALLOW)),
    everywhere("io_uring_enter_refused", &["filter=io_uring_enter:EPERM"], Says(ALLOW)),
    everywhere("io_uring_register_refused", &["filter=io_uring_register:EPERM"], Says(ALLOW)),
    everywhere("io_uring_register_hidden", &["filter=io_uring_register:ENOSYS"], Says(ALLOW)),
    // Root may use io_uring until it gives up its privileges. The setting is for the whole machine, so a filter gives
    // the kernel's answer.
    Case {
        // The demo keeps its privileges.
        demo: Says(ALLOW),
        ..everywhere(
            "io_uring_for_a_group_without_a_number",
            &["bind=DIRECTORY/kernel:/proc/sys/kernel", "filter=io_uring_setup:EPERM"],
            Says(&["kernel.io_uring_group names no group", "sysctl kernel.io_uring_group=GID"]),
        )
    },
];

fn main() -> ExitCode {
    let needs = || {
        let kind = DiskKind::Ext4PageCache.needs().into_iter();
        kind.chain(broker_process::needs()).chain([Need::root(), place::dd_need()]).collect::<Vec<Need>>()
    };
    let mut tests: Vec<Test> = CASES
        .iter()
        .map(|case| {
            let name =
                format!("in_{}_each_program_works_or_says_what_to_change_and_probe_agrees_with_serve", case.name);
            test(name, needs(), || each_program(case))
        })
        .collect();
    tests.push(test("a_server_works_with_the_limits_that_its_refusal_names", needs(), enough));
    harness::run(tests)
}

fn each_program(case: &Case) -> Result<()> {
    let place = Place::new()?;
    let environment = place.environment(case.words)?;
    let report = place.probe(&environment)?;
    for (mode, expected) in [(Mode::Virtqueue, case.virtqueue), (Mode::Direct, case.direct)] {
        let ended = place.serve(&environment, mode).with_context(|| format!("serve --mode {}", mode.name()))?;
        ensure!(
            report.has(mode)? == ended.is_none(),
            "the probe says that {} is {}available, but the server: {ended:?}",
            mode.name(),
            if report.has(mode)? { "" } else { "not " }
        );
        check(ended, expected).with_context(|| format!("serve --mode {}", mode.name()))?;
    }
    // The probe prints the advice first.
    let advice = report.advice()?;
    ensure!(report.has(Mode::Direct)? || !advice.starts_with("direct mode"), "the advice is {advice:?}");
    check(place.demo(&environment)?, case.demo).context("demo")?;
    check(place.dd(&environment)?, case.dd).context("ringpass-dd")
}

fn check(ended: Option<Ended>, expected: Expected) -> Result<()> {
    match (ended, expected) {
        (None, Works | WorksOrSays(_)) => Ok(()),
        (None, Says(parts)) => anyhow::bail!("the program works, but it must say {parts:?}"),
        (Some(ended), Works) => anyhow::bail!("the program does not work: {ended:?}"),
        (Some(ended), Says(parts) | WorksOrSays(parts)) => assert_line(&ended, parts),
    }
}

/// A server refuses and names a limit. A server with that limit serves a front-end.
fn enough() -> Result<()> {
    let place = Place::new()?;
    for (words, before) in [(&["nofile=10"][..], "LimitNOFILE="), (&["memlock=0", "nobody"], "ulimit -H -l ")] {
        let Some(ended) = place.serve(&place.environment(words)?, Mode::Virtqueue)? else {
            // Kernels before 6.14 charge no user for a ring.
            continue;
        };
        let number = ended.number_after(before)?;
        let (limit, rest) = words.split_first().context("a word")?;
        let limit = match limit.split_once('=').context("a limit")?.0 {
            "memlock" => format!("memlock={}", number << 10),
            kind => format!("{kind}={number}"),
        };
        let words: Vec<&str> = [limit.as_str()].into_iter().chain(rest.iter().copied()).collect();
        let ended = place.serve(&place.environment(&words)?, Mode::Virtqueue)?;
        ensure!(ended.is_none(), "{limit} is not enough: {ended:?}");
        eprintln!("{limit} is enough");
    }
    Ok(())
}
