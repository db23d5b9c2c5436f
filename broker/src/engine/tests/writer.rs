//! The thread that writes into the page cache, without a worker.

use std::fs::{self, File};
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::libc::{self, iovec};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};

use super::driver::{PATIENCE, wait_readable, wait_until};
use crate::alone::alone;
use crate::engine::command::{CommandReceiver, CommandSender, command_channel};
use crate::engine::poll::PollPolicy;
use crate::engine::writer::Writer;

const JOBS_MAX: usize = 6;
const JOB_BYTES: usize = 512;

struct Rig {
    writer: Writer,
    /// The sender is there for the wake-up.
    worker: (CommandSender, CommandReceiver),
    file: File,
}

impl Rig {
    fn new(poll_time: Duration, file: File) -> Self {
        let worker = command_channel().unwrap();
        let writer = Writer::start(JOBS_MAX, PollPolicy::new(poll_time), worker.1.waker()).unwrap();
        Self { writer, worker, file }
    }

    fn send(&mut self, number: u32, data: &[iovec], offset_bytes: u64) {
        // SAFETY: each test takes all results, or drops the writer, before its file, iovecs and data go.
        unsafe { self.writer.send(number, self.file.as_fd(), data, offset_bytes) };
        self.writer.wake();
    }

    fn result(&mut self) -> (u32, i32) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(result) = self.writer.take() {
                return result;
            }
            assert!(Instant::now() < end, "a job has no result");
            thread::yield_now();
        }
    }

    /// Sleeps until there is a result, as a worker does.
    fn sleep(&self) {
        if self.writer.announce_sleep() {
            assert!(wait_readable(self.worker.1.eventfd(), PATIENCE), "nobody wakes the worker");
            self.worker.1.take_wake_up();
        }
        self.writer.announce_waking();
    }
}

fn data(bytes: &[u8]) -> iovec {
    iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

#[test]
fn jobs_are_carried_out_in_their_order_and_each_gets_its_result() {
    for poll_time in [Duration::ZERO, Duration::from_micros(32), Duration::from_secs(1)] {
        let mut rig = Rig::new(poll_time, tempfile::tempfile().unwrap());
        let mut number = 0;
        // More than once around the rings, and each number of jobs outstanding.
        for round in 0..300 {
            let jobs = 1 + round % JOBS_MAX;
            let bytes: Vec<Vec<u8>> = (0..jobs).map(|job| vec![(round + job) as u8; JOB_BYTES + job]).collect();
            let iovecs: Vec<[iovec; 2]> =
                bytes.iter().map(|bytes| bytes.split_at(100)).map(|(one, two)| [data(one), data(two)]).collect();
            // All at the same place: the last one counts.
            iovecs.iter().zip(number..).for_each(|(iovecs, number)| rig.send(number, iovecs, round as u64));
            for job in 0..jobs {
                assert_eq!(rig.result(), (number, (JOB_BYTES + job) as i32));
                number += 1;
            }
            assert!(!rig.writer.is_busy() && rig.writer.take().is_none());
            let mut found = vec![0; JOB_BYTES + jobs - 1];
            rig.file.read_exact_at(&mut found, round as u64).unwrap();
            assert_eq!(found, bytes[jobs - 1]);
        }
    }
}

#[test]
fn a_write_that_fails_gives_the_kernels_errno() {
    let mut rig = Rig::new(Duration::ZERO, File::open("/dev/null").unwrap());
    let bytes = [0; JOB_BYTES];
    let iovecs = [data(&bytes)];
    for number in [7, u32::MAX] {
        rig.send(number, &iovecs, 0);
        assert_eq!(rig.result(), (number, -libc::EBADF));
    }
}

#[test]
fn a_worker_that_sleeps_is_woken_by_every_result_that_it_has_not_seen() {
    for poll_time in [Duration::ZERO, Duration::from_micros(32)] {
        let mut rig = Rig::new(poll_time, tempfile::tempfile().unwrap());
        let bytes = [1; JOB_BYTES];
        let iovecs = [data(&bytes)];
        for number in 0..20_000 {
            rig.send(number, &iovecs, 0);
            while !rig.writer.has_result() {
                rig.sleep();
            }
            assert_eq!(rig.result().0, number);
        }
        assert!(rig.writer.announce_sleep(), "without jobs it may sleep");
    }
}

#[test]
fn a_worker_does_not_sleep_over_a_result() {
    let mut rig = Rig::new(Duration::ZERO, tempfile::tempfile().unwrap());
    let bytes = [1; JOB_BYTES];
    let iovecs = [data(&bytes)];
    rig.send(0, &iovecs, 0);
    wait_until("the result is there", || rig.writer.has_result());
    assert!(!rig.writer.announce_sleep());
}

#[test]
fn an_engine_leaves_writes_that_would_block_to_the_thread_and_no_others() {
    alone("engine::tests::writer::an_engine_leaves_writes_that_would_block_to_the_thread_and_no_others", || {
        const WRITES: u64 = 50;
        for poll_time in [Duration::ZERO, Duration::from_micros(32)] {
            let mut rig = super::rig::Rig::new(super::rig::Options { poll_time, ..Default::default() });
            let is_left_to_thread = refuses_not_to_block(rig.image.as_file());
            let mut driver = rig.running(0);
            // The worker starts its writer when it takes the disk, and the thread names itself.
            wait_until("the writer's start", || !writers().is_empty());
            let before = write_calls_of_writer();
            for number in 0..WRITES {
                assert_eq!(driver.write_data(number * 8, &[number as u8; 4096]).status, 0);
            }
            let calls = write_calls_of_writer() - before;
            if is_left_to_thread {
                assert!(calls >= WRITES, "the thread has made {calls} calls for {WRITES} writes");
            } else {
                // The first write has shown that io_uring does not need the thread.
                assert_eq!(calls, 1, "calls of the thread for {WRITES} writes");
            }
            for number in 0..WRITES {
                assert_eq!(rig.on_disk(number * 8, 4096), [number as u8; 4096]);
            }
            // Its writer must not end while the next one's calls are counted.
            rig.engine.shutdown();
        }
    });
}

/// Whether the file system does not write into the page cache of this file without blocking: what the writer asks with its first
/// write. (ext4 refuses, XFS does not.)
fn refuses_not_to_block(file: &File) -> bool {
    let (mut first, flags) = ([0; 1], ReadWriteFlags::NOWAIT);
    file.read_exact_at(&mut first, 0).unwrap();
    pwritev2(file, &[IoSlice::new(&first)], 0, flags) == Err(Errno::OPNOTSUPP)
}

/// The threads of this name.
fn writers() -> Vec<PathBuf> {
    let threads = fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap().path());
    let is_writer = |thread: &PathBuf| {
        // A thread that ends meanwhile has no name.
        fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.starts_with("writer-"))
    };
    threads.filter(is_writer).collect()
}

/// How often the one writer has called write(2) or its kin (proc_pid_io(5)).
fn write_calls_of_writer() -> u64 {
    let writers = writers();
    let [writer] = &*writers else { panic!("one engine with one worker runs: {writers:?}") };
    let io = fs::read_to_string(writer.join("io")).unwrap();
    let calls = io.lines().find_map(|line| line.strip_prefix("syscw: "));
    calls.unwrap_or_else(|| panic!("no syscw in {io}")).parse().unwrap()
}

#[test]
fn a_file_that_takes_writes_without_blocking_needs_no_thread() {
    let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    image.as_file().write_all_at(&[0; 8192], 0).unwrap();
    image.as_file().sync_all().unwrap();
    let bytes = vec![1; 8192];
    let iovecs =
        [iovec { iov_base: bytes[bytes.as_ptr().align_offset(4096)..].as_ptr().cast_mut().cast(), iov_len: 4096 }];

    let mut page_cache = Rig::new(Duration::ZERO, image.reopen().unwrap());
    page_cache.send(0, &iovecs, 0);
    assert_eq!(page_cache.result(), (0, 4096));
    assert_eq!(page_cache.writer.is_needed(), refuses_not_to_block(image.as_file()));

    // There is no page cache to wait for.
    let direct = File::options().write(true).custom_flags(libc::O_DIRECT).open(image.path()).unwrap();
    let mut direct = Rig::new(Duration::ZERO, direct);
    direct.send(0, &iovecs, 0);
    let result = direct.result().1;
    assert!([4096, -libc::EAGAIN].contains(&result), "{result}");
    assert!(!direct.writer.is_needed());
}

#[test]
fn the_thread_ends_with_its_writer() {
    let mut rig = Rig::new(Duration::from_secs(1), tempfile::tempfile().unwrap());
    let bytes = [1; JOB_BYTES];
    let iovecs = [data(&bytes)];
    rig.send(0, &iovecs, 0);
    // Waits for the job and for the thread, which has the other reference to the wake-up.
    drop(rig.writer);
    assert_eq!(rig.worker.1.wake_up_users(), 2, "the sender and the receiver of commands");
}
