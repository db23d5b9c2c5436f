//! Requests that wait: for time, files, other rings, children and futexes.

use super::*;

impl Lab {
    pub(super) fn waiting(&mut self, operation: Operation) -> Result<Reach> {
        let hour = HOUR.as_ptr().addr() as u64;
        match operation {
            Operation::TIMEOUT => {
                let bad = self.run(Sqe { addr: UNMAPPED, len: 1, ..self.sqe() })?;
                ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
                Ok(Reach::READS_MEMORY | self.waits(Sqe { addr: hour, len: 1, ..self.sqe() })?)
            }
            Operation::LINK_TIMEOUT => self.reads(hour, |sqe, addr| Sqe { addr, len: 1, ..sqe }),
            // IORING_TIMEOUT_UPDATE.
            Operation::TIMEOUT_REMOVE => self.reads(hour, |sqe, off| Sqe { addr: 1, off, rw_flags: 2, ..sqe }),
            _ => {
                let (reader, _writer) = pipe()?;
                self.waits(Sqe { fd: reader.as_raw_fd(), rw_flags: 1, ..self.sqe() })
            }
        }
    }

    pub(super) fn epoll(&mut self, operation: Operation) -> Result<Reach> {
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)?;
        let (reader, mut writer) = pipe()?;
        // struct epoll_event is packed: events, data.
        let mut events = [1u32, 5, 0];
        let at = events.as_mut_ptr().addr() as u64;
        if operation == Operation::EPOLL_CTL {
            // EPOLL_CTL_ADD, by descriptors although the flag says slots.
            let add = Sqe { flags: 1, fd: epoll.as_raw_fd(), len: 1, off: reader.as_raw_fd() as u64, ..self.sqe() };
            let reads = self.reads(at, |_, addr| Sqe { addr, ..add })?;
            ensure!(self.run(Sqe { addr: at, ..add })? == -17, "the descriptor was not in the epoll set");
            return Ok(Reach::OTHER_FILES | reads);
        }
        rustix::event::epoll::add(
            &epoll,
            &reader,
            rustix::event::epoll::EventData::new_u64(5),
            rustix::event::epoll::EventFlags::IN,
        )?;
        let wait = Sqe { fd: epoll.as_raw_fd(), addr: at, len: 1, ..self.sqe() };
        writer.write_all(b"x")?;
        events = [0; 3];
        ensure!(self.succeed(wait)? == 1);
        ensure!(std::hint::black_box(events)[1] == 5, "nothing was written: {events:?}");
        let quiet = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)?;
        Ok(Reach::WRITES_MEMORY | self.waits(Sqe { fd: quiet.as_raw_fd(), ..wait })?)
    }

    /// Shows that messages to another ring need no reader there.
    pub(super) fn other_ring(&mut self) -> Result<Reach> {
        let mut other = io_uring::IoUring::new(4)?;
        let message = Sqe { fd: other.as_raw_fd(), off: 77, len: 5, ..self.sqe() };
        // SAFETY: the operation has no address.
        let results = unsafe { self.ring.submit(&vec![message; MANY], MANY) }?;
        ensure!(results.iter().all(|&result| result == Some(0)), "the kernel refused messages");
        let cqe = other.completion().next().context("nothing came")?;
        ensure!(cqe.user_data() == 77 && cqe.result() == 5, "{cqe:?}");
        Ok(Reach::OTHER_RINGS | Reach::UNBOUNDED_MEMORY)
    }

    pub(super) fn processes(&mut self, operation: Operation) -> Result<Reach> {
        // FUTEX2_SIZE_U32 | FUTEX2_PRIVATE.
        let futex = Sqe { fd: 2 | 128, addr3: u64::from(u32::MAX), ..self.sqe() };
        let word = Arc::new(AtomicU32::new(0));
        let at = word.as_ptr().addr() as u64;
        match operation {
            Operation::WAITID => {
                let mut child = Sleeper::start()?;
                let mut about = [0u8; 128];
                // P_PID, WEXITED.
                let wait = Sqe { fd: child.0.id() as i32, len: 1, file_index: 4, ..self.sqe() };
                let waits = self.waits(Sqe { fd: child.0.id() as i32, ..wait })?;
                child.0.kill()?;
                // The kernel serves the waiting requests first, so another ring shows the rest.
                let mut other = Self::new(operation)?;
                let mut ended = Command::new("true").stdin(Stdio::null()).spawn()?;
                let pid = ended.id() as i32;
                other.succeed(Sqe { fd: pid, off: about.as_mut_ptr().addr() as u64, ..wait })?;
                ensure!(std::hint::black_box(about).iter().any(|&byte| byte != 0), "nothing was written");
                ensure!(ended.wait().is_err(), "the child was still there for its parent");
                Ok(Reach::PROCESSES | Reach::WRITES_MEMORY | waits)
            }
            Operation::FUTEX_WAIT => {
                let bad = self.run(Sqe { addr: UNMAPPED & !3, off: 0, ..futex })?;
                ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
                let waits = self.waits(Sqe { addr: at, ..futex })?;
                Ok(Reach::PROCESSES | Reach::READS_MEMORY | waits)
            }
            Operation::FUTEX_WAKE => {
                let bad = self.run(Sqe { addr: 0, off: 1, fd: 2, ..futex })?;
                ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
                let waiter = thread::spawn({
                    let word = word.clone();
                    move || {
                        while word.load(Ordering::SeqCst) == 0 {
                            let flags = rustix::thread::futex::Flags::PRIVATE;
                            match rustix::thread::futex::wait(&word, flags, 0, None) {
                                Ok(()) => return true,
                                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                                Err(_) => return false,
                            }
                        }
                        false
                    }
                });
                let until = Instant::now() + Duration::from_secs(30);
                while self.succeed(Sqe { addr: at, off: 1, ..futex })? == 0 {
                    ensure!(Instant::now() < until, "the thread never waited");
                    thread::yield_now();
                }
                word.store(1, Ordering::SeqCst);
                ensure!(waiter.join().is_ok_and(|woken| woken), "the thread was not woken");
                Ok(Reach::PROCESSES | Reach::READS_MEMORY)
            }
            _ => {
                // struct futex_waitv: val, uaddr, flags.
                let vector = [0, at, 2 | 128];
                let list = vector.as_ptr().addr() as u64;
                let wait = Sqe { len: 1, ..self.sqe() };
                let bad = self.run(Sqe { addr: UNMAPPED, ..wait })?;
                ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
                let waits = self.waits(Sqe { addr: list, ..wait })?;
                Ok(Reach::PROCESSES | Reach::READS_MEMORY | waits)
            }
        }
    }
}

/// A child that lives until it is killed.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Result<Self> {
        Ok(Self(Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?))
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // The child may have ended, and an operation may have waited for it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
