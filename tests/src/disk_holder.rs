//! Other processes that have a disk: the test program itself, run again.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    os::fd::{AsFd, AsRawFd},
    path::Path,
    process::{Child, ChildStdout, Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use io_uring::{IoUring, opcode, types};
use memmap2::MmapMut;
use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};
use ringpass_broker::disk::{DirectIo, Disk, DiskConfig};

/// Set for the child process: what it has. Its argument is the path.
const CHILD_VARIABLE: &str = "RINGPASS_TEST_DISK_HOLDER";

const BLOCK_BYTES: usize = 4096;

/// What the other process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The disk, for reading and writing.
    Disk,
    /// The disk, for reading.
    ReadOnlyDisk,
    /// The disk, for reading and writing; [`DiskHolder::write`] submits a write of zeros to the first block, with a ring.
    DiskAndRing,
    /// A POSIX lock on the whole file.
    PosixLock,
    /// Locks on bytes of the file as QEMU has them while it writes to an image that no other process may write to.
    QemuLocks,
}

impl Held {
    const ALL: [Self; 5] = [Self::Disk, Self::ReadOnlyDisk, Self::DiskAndRing, Self::PosixLock, Self::QemuLocks];

    fn word(self) -> String {
        format!("{self:?}")
    }
}

/// To be called first in `main`: in a child process this has the disk until the standard input ends, and returns the exit
/// code of the program.
pub fn run_child() -> Option<ExitCode> {
    let word = env::var(CHILD_VARIABLE).ok()?;
    let held = Held::ALL.into_iter().find(|held| held.word() == word).expect("a word of this module");
    hold(held).expect("holding the disk");
    Some(ExitCode::SUCCESS)
}

fn hold(held: Held) -> Result<()> {
    let path = env::args_os().nth(1).context("a path")?;
    let config = DiskConfig::new(&path);
    match held {
        Held::Disk => until_told(&Disk::open(&config.direct_io(DirectIo::Off))?),
        Held::ReadOnlyDisk => until_told(&Disk::open(&config.direct_io(DirectIo::Off).read_only(true))?),
        Held::DiskAndRing => write_with_ring(&Disk::open(&config)?),
        Held::PosixLock => {
            let file = fs::File::options().read(true).write(true).open(&path)?;
            fcntl(&file, FcntlArg::F_SETLK(&lock(libc::F_WRLCK, 0, 0)))?;
            until_told(&file)
        }
        Held::QemuLocks => {
            let file = fs::File::options().read(true).write(true).open(&path)?;
            // Reads consistently, writes, resizes; others may not write or resize (block/file-posix.c).
            for byte in [100, 101, 103, 201, 203] {
                fcntl(&file, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, byte, 1)))?;
            }
            until_told(&file)
        }
    }
}

fn lock(kind: i32, l_start: i64, l_len: i64) -> libc::flock {
    libc::flock { l_type: kind as _, l_whence: libc::SEEK_SET as _, l_start, l_len, l_pid: 0 }
}

fn say(word: &str) -> Result<()> {
    println!("{word}");
    Ok(std::io::stdout().flush()?)
}

fn until_told(_held: &impl AsFd) -> Result<()> {
    say("held")?;
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

/// Submits a write and waits for its end, or for the end of this process.
fn write_with_ring(disk: &Disk) -> Result<()> {
    let mut ring = IoUring::new(2)?;
    let page = MmapMut::map_anon(BLOCK_BYTES)?;
    ring.submitter().register_files(&[disk.as_fd().as_raw_fd()])?;
    say("held")?;
    std::io::stdin().read_exact(&mut [0])?;
    let entry = opcode::Write::new(types::Fixed(0), page.as_ptr(), BLOCK_BYTES as u32).build();
    // SAFETY: the page lives until the process ends, and the kernel only reads it.
    unsafe { ring.submission().push(&entry) }?;
    ring.submit()?;
    say("submitted")?;
    ring.submit_and_wait(1)?;
    Ok(())
}

/// A process that has a disk. The drop kills it.
#[derive(Debug)]
pub struct DiskHolder {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl DiskHolder {
    /// Starts the process, and waits until it has the disk.
    ///
    /// # Errors
    ///
    /// The process does not get the disk; its standard error says why.
    pub fn start(held: Held, path: &Path) -> Result<Self> {
        let mut child = Command::new(env::current_exe()?)
            .arg(path)
            .env(CHILD_VARIABLE, held.word())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let said = BufReader::new(child.stdout.take().context("a pipe")?);
        let mut holder = Self { child, said };
        holder.expect("held")?;
        Ok(holder)
    }

    fn expect(&mut self, word: &str) -> Result<()> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        ensure!(line.trim_end() == word, "the child says {line:?}");
        Ok(())
    }

    /// The name and number of the process, as messages have them.
    ///
    /// # Errors
    ///
    /// The process has ended.
    pub fn name(&self) -> Result<String> {
        let pid = self.child.id();
        Ok(format!("{}[{pid}]", fs::read_to_string(format!("/proc/{pid}/comm"))?.trim_end()))
    }

    /// Has a process with [`Held::DiskAndRing`] submit its write.
    ///
    /// # Errors
    ///
    /// The process has ended.
    pub fn write(&mut self) -> Result<()> {
        self.child.stdin.as_mut().context("a pipe")?.write_all(b"w")?;
        self.expect("submitted")
    }

    /// Kills the process and does not wait for its end, which can take as long as its I/O.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill()?)
    }

    /// Has the process release the disk and end.
    ///
    /// # Errors
    ///
    /// The process fails.
    pub fn end(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        ensure!(self.child.wait()?.success());
        Ok(())
    }
}

impl Drop for DiskHolder {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The message with which the broker refuses a disk. Checks that it has all of these parts.
///
/// # Errors
///
/// The broker does not refuse the disk, or a part is missing.
pub fn refusal(config: &DiskConfig, parts: &[&str]) -> Result<String> {
    let error = match Disk::open(config) {
        Ok(_) => bail!("{:?} was not refused", config.path),
        Err(error) => error,
    };
    ensure!(error.is_busy(), "{error}");
    let message = error.to_string();
    for part in parts {
        ensure!(message.contains(part), "{part:?} is missing in: {message}");
    }
    Ok(message)
}
